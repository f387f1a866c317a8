// The whole device as one bar. Where the process or the model is a thin slice of it, a second bar magnifies that slice.

const SCOPES = ["model", "process", "device"];

export default panel({
  name: "device_bar",
  store: () => ({ scope: null }),
  build(ui) {
    const headline = h("div", { class: "algm-headline" });
    const pick = segmented({
      label: ui.t("magnify"),
      options: SCOPES.map((scope) => [scope, ui.t(`scope ${scope}`), ui.t(`scope ${scope} hint`)]),
      onPick: (scope) => {
        ui.shared.scope = scope;
        draw();
      },
    });
    const strip = h("div", { class: "algm-strip", "aria-hidden": "true" });
    const lens = h("svg", {
      class: "algm-lens",
      viewBox: "0 0 1000 10",
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    const bar = h("div", { class: "algm-bar", role: "img" });
    const marks = h("div", { class: "algm-marks", "aria-hidden": "true" });
    const legend = h("ul", { class: "algm-legend" });
    const notes = h("div", { class: "algm-notes" });
    const node = h(
      "div",
      {},
      h("div", { class: "algm-line" }, headline, h("span", { class: "algm-space" }), pick.node),
      strip,
      lens,
      bar,
      marks,
      legend,
      notes,
    );

    let state = null;
    const inside = (segment, scope) => SCOPES.indexOf(segment.scope) <= SCOPES.indexOf(scope);
    const sum = (segments) => segments.reduce((total, segment) => total + Math.max(0, segment.nbytes ?? 0), 0);
    // Zoom in until the model is at least an eighth of the picture.
    function suggested() {
      const model = sum(state.segments.filter((s) => inside(s, "model")));
      const process = sum(state.segments.filter((s) => inside(s, "process")));
      if (model >= state.total / 8) return "device";
      return model >= process / 8 ? "process" : "model";
    }
    function piece(segment, whole) {
      const share = whole ? (100 * Math.max(0, segment.nbytes ?? 0)) / whole : 0;
      const text = `${ui.owner(segment)} ${formatBytes(segment.nbytes)}`;
      return h(
        "span",
        {
          class: "algm-piece",
          "data-colour": segment.colour,
          style: { width: `${share}%` },
          title: `${text}${segment.counts ? `\n${segment.counts}` : ""}`,
        },
        h("span", {}, text),
      );
    }
    function draw() {
      const scope = ui.shared.scope ?? suggested();
      pick.set(scope);
      const process = sum(state.segments.filter((s) => inside(s, "process")));
      const used = state.process ?? process;
      const free = sum(state.segments.filter((s) => s.kind === "free"));
      headline.replaceChildren(
        h("b", {}, ui.t("this process", { bytes: formatBytes(used) })),
        h(
          "span",
          { class: "algm-dim" },
          ` ${ui.t("of device", { total: formatBytes(state.total), free: formatBytes(free) })}`,
        ),
      );
      const shown = state.segments.filter((s) => inside(s, scope) && s.nbytes);
      const whole = scope === "device" ? state.total : sum(shown) || 1;
      const zoomed = scope !== "device";
      strip.hidden = !zoomed;
      lens.style.display = zoomed ? "" : "none";
      if (zoomed) {
        strip.replaceChildren(...state.segments.filter((s) => s.nbytes).map((s) => piece(s, state.total)));
        const share = (1000 * whole) / state.total;
        lens.replaceChildren(h("polygon", { points: `0,0 ${Math.max(share, 3)},0 1000,10 0,10` }));
      }
      bar.replaceChildren(...shown.map((s) => piece(s, whole)));
      bar.setAttribute(
        "aria-label",
        `${ui.t("title")}: ${shown.map((s) => `${ui.owner(s)} ${formatBytes(s.nbytes)}`).join(", ")}`,
      );
      drawMarks(scope, whole, used);
      legend.replaceChildren(
        ...state.segments.filter((s) => s.kind !== "free").map((s) => item(s, s.nbytes)),
        ...state.beside.map((row) =>
          h(
            "li",
            { class: "is-zero", title: row.counts },
            swatch(row.colour),
            ui.t(`beside ${row.place}`, { name: row.name, bytes: formatBytes(row.nbytes) }),
          ),
        ),
        item({ kind: "free", colour: "free", counts: ui.t("free hint") }, free),
        h("li", { class: "algm-total algm-dim" }, ui.t(`source ${state.source}`, { total: formatBytes(state.total) })),
      );
      notes.hidden = !state.notes.length;
      notes.replaceChildren(...state.notes.map((note) => h("span", { class: "algm-dim" }, note)));
      requestAnimationFrame(hideCutLabels);
    }
    function item(segment, nbytes) {
      const zero = nbytes === 0;
      return h(
        "li",
        { class: zero ? "is-zero" : "", title: segment.counts || ui.owner(segment) },
        swatch(segment.colour),
        h("span", {}, ui.owner(segment)),
        h("b", {}, formatBytes(nbytes)),
      );
    }
    function drawMarks(scope, whole, used) {
      const all = [
        ["process", used],
        ["budget", state.budget],
      ];
      marks.replaceChildren(
        ...all
          .filter(([, at]) => at !== null && at !== undefined && scope !== "model")
          .map(([what, at]) => {
            const share = (100 * at) / whole;
            const out = share > 100.5;
            return h(
              "span",
              {
                class: `algm-mark algm-mark-${what}${out ? " is-out" : ""}${share > 60 ? " is-left" : ""}`,
                style: { left: `${Math.min(share, 100)}%` },
              },
              h("i", {}),
              `${ui.t(`mark ${what}`)} ${formatBytes(at)}${out ? " →" : ""}`,
            );
          }),
      );
      marks.hidden = !marks.children.length;
    }
    // A label that does not fit its piece is in the legend anyway.
    function hideCutLabels() {
      for (const one of bar.children) {
        const label = one.firstChild;
        label.style.visibility = label.scrollWidth + 10 > one.clientWidth ? "hidden" : "visible";
      }
    }
    const watch = new ResizeObserver(() => {
      if (state) hideCutLabels();
    });
    watch.observe(bar);
    return {
      node,
      update(next) {
        state = next;
        draw();
      },
      gone: () => watch.disconnect(),
    };
  },
});
