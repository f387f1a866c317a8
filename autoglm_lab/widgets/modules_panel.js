// One line a module: what it is, where it is, and its switch.

export default panel({
  name: "modules_panel",
  build(ui) {
    const list = h("div", { class: "algm-modules" });
    const places = segmented({
      label: ui.t("park to"),
      onPick: (place) => ui.send("park_to", { place }),
      options: ["auto", "host", "disk"].map((place) => [place, ui.t(`place ${place}`), ui.t(`place ${place} hint`)]),
    });
    const alive = field({
      label: ui.t("keep alive"),
      type: "number",
      min: 0,
      step: 5,
      inputmode: "numeric",
      onDone: (value) => ui.send("keep_alive", { seconds: Number(value) }),
    });
    const unit = h("span", { class: "algm-dim" }, ui.t("s idle"));
    const foot = h(
      "div",
      { class: "algm-row algm-foot" },
      h("span", { class: "algm-label" }, ui.t("park to")),
      places.node,
      h("span", { class: "algm-pair" }, h("span", { class: "algm-dim" }, ui.t("after")), alive.node, unit),
    );
    const precision = segmented({
      label: ui.t("precision"),
      onPick: (value) => ui.send("precision", { precision: value }),
      options: ["model", "int8", "int4"].map((one) => [one, ui.t(`weights ${one}`), ui.t(`weights ${one} hint`)]),
    });
    const next = h("span", { class: "algm-dim algm-small", "data-next": "load", "aria-live": "polite" });
    // What it cost when it was measured, beside the switch that takes it.
    const cost = h("span", { class: "algm-dim algm-small", "data-cost": "weights", title: ui.t("measured hint") });
    const weights = h(
      "div",
      { class: "algm-row algm-foot" },
      h("span", { class: "algm-label" }, ui.t("precision")),
      precision.node,
      next,
      cost,
    );
    const node = h("div", {}, h("h4", {}, ui.t("title")), list, foot, weights);
    const lines = new Map();

    function line(name) {
      const mark = h("span", { class: "algm-swatch", "aria-hidden": "true" });
      const size = h("span", { class: "algm-num" });
      const where = h("span", { class: "algm-dim algm-where" });
      const move = h("button", { type: "button", class: "algm-button algm-icon" });
      const pick = segmented({
        label: `${name}: ${ui.t("residency")}`,
        options: ["keep", "on-demand", "off"].map((r) => [r, ui.t(`residency ${r}`), ui.t(`residency ${r} hint`)]),
        onPick: (residency) => ui.send("residency", { module: name, residency }),
      });
      const node = h(
        "div",
        { class: "algm-module", "data-module": name },
        mark,
        h("span", { class: "algm-name" }, h("b", {}, name), size),
        where,
        move,
        pick.node,
      );
      return {
        node,
        update(module, control) {
          const here = module.place === "device",
            moving = ui.busy(`move ${name}`) || module.place === "moving";
          mark.dataset.colour = module.colour;
          node.dataset.place = module.place;
          size.textContent = formatBytes(module.nbytes);
          size.title = module.dtype;
          where.textContent = moving ? ui.t("moving") : module.trouble || whereabouts(module);
          where.title = [module.trouble, module.last ? told(module.last) : "", copyOf(module), module.note]
            .filter(Boolean)
            .join("\n");
          where.classList.toggle("is-trouble", Boolean(module.trouble) && !moving);
          const doing = here ? "park" : "wake";
          move.textContent = ui.t(doing);
          move.title = ui.t(`${doing} now`, { name });
          move.setAttribute("aria-label", move.title);
          move.onclick = () => {
            move.disabled = true;
            ui.send("move", { module: name, to: doing });
          };
          move.disabled = moving || !control || (!here && module.residency === "off");
          pick.set(module.residency, ui.busy(name) || !control);
        },
      };
    }
    function whereabouts({ place, last, copy }) {
      const took = last && last.seconds !== null ? formatSeconds(last.seconds) : "";
      if (place === "device") return took && last.kind === "woke" ? `${ui.t("event woke")} ${took}` : ui.t("on device");
      const parked = last?.kind === "parked" ? took : "";
      return [ui.t(`on ${place}`), copy && ui.t(copy), parked].filter(Boolean).join(" · ");
    }
    const copyOf = ({ place, copy }) => (copy && place === "device" ? ui.t("copy on host", { kind: ui.t(copy) }) : "");
    function told(last) {
      const kind = ui.t(`event ${last.kind}`),
        took = last.seconds !== null ? ` ${formatSeconds(last.seconds)}` : "";
      return `${kind} ${last.subject}${took}${last.nbytes ? ` ${formatBytes(last.nbytes)}` : ""}${last.why ? ` (${last.why})` : ""}`;
    }
    function update(state) {
      for (const module of state.modules) {
        if (!lines.has(module.name)) {
          const made = line(module.name);
          lines.set(module.name, made);
          list.append(made.node);
        }
        lines.get(module.name).update(module, state.control);
      }
      for (const [name, made] of lines)
        if (!state.modules.some((module) => module.name === name)) {
          made.node.remove();
          lines.delete(name);
        }
      for (const label of places.node.querySelectorAll("[data-value=host]")) label.hidden = state.host_is_device;
      weights.hidden = !state.in_kernel;
      precision.set(state.wanted, ui.busy("precision"));
      next.hidden = state.wanted === state.precision;
      cost.hidden = state.wanted === "model";
      cost.textContent = cost.hidden ? "" : ui.t(`cost ${state.wanted}`);
      const bytes = formatBytes(Math.abs(state.frees));
      const load = state.wanted === "model" ? "lab.load(…)" : `lab.load(…, quantize="${state.wanted}")`;
      next.textContent = next.hidden ? "" : ui.t(state.frees < 0 ? "next load takes" : "next load frees", { bytes, load });
      places.set(state.park_to, ui.busy("park_to") || !state.control);
      alive.set(state.keep_alive, ui.busy("keep_alive") || !state.control);
    }
    return { node, update };
  },
});
