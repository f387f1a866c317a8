// What the settings will need for a workload, beside what is held now; and what would make it fit.

const OFTEN = 80; // milliseconds between two messages while a slider moves

export default panel({
  name: "plan_panel",
  build(ui) {
    let state = null,
      held = null;
    const verdict = h("span", { class: "algm-verdict algm-num", role: "status" });
    const sliders = {
      context: slider("context", (at) => state.steps[at]),
      images: slider("images", (at) => at),
      conversations: slider("conversations", (at) => at + 1),
    };
    const planned = h("div", { class: "algm-bar", role: "img" }),
      measured = h("div", { class: "algm-bar", role: "img" });
    const limit = h("i", { class: "algm-limit", "aria-hidden": "true" });
    const plannedBytes = h("b", {}),
      measuredBytes = h("b", { class: "algm-second" }),
      limitWord = h("span", { class: "algm-limit-word algm-num" });
    const bars = h(
      "div",
      { class: "algm-plan-bars" },
      h("span", { class: "algm-dim", title: ui.t("planned hint") }, ui.t("planned")),
      h("span", { class: "algm-dim algm-second", title: ui.t("measured hint") }, ui.t("measured")),
      h("div", { class: "algm-stack" }, planned, measured, limit),
      plannedBytes,
      measuredBytes,
    );
    const legend = h("ul", { class: "algm-legend" });
    const list = h("div", { class: "algm-alternatives" });
    const node = h(
      "div",
      {},
      h("div", { class: "algm-line" }, h("h4", { title: ui.t("title hint") }, ui.t("title")), verdict),
      h(
        "div",
        { class: "algm-workload" },
        Object.values(sliders).map((one) => one.node),
      ),
      bars,
      legend,
      list,
    );

    function slider(figure, valueAt) {
      let timer = null,
        dragging = false;
      const output = h("output", {});
      const tell = () => {
        const value = valueAt(Number(input.value));
        output.textContent = figure === "context" ? ui.t("tokens", { n: formatCount(value) }) : String(value);
        input.setAttribute("aria-valuetext", output.textContent);
        input.style.setProperty("--algm-fill", `${(100 * input.value) / Math.max(1, input.max)}%`);
      };
      const send = () => {
        timer = null;
        ui.send("workload", { figure, value: valueAt(Number(input.value)) });
      };
      const input = h("input", {
        type: "range",
        min: 0,
        step: 1,
        class: "algm-slider",
        "aria-label": ui.t(`${figure} hint`),
        oninput: () => {
          dragging = true;
          tell();
          timer ??= setTimeout(send, OFTEN);
        },
        onchange: () => {
          dragging = false;
          clearTimeout(timer);
          send();
        },
      });
      const node = h("label", { title: ui.t(`${figure} hint`) }, h("span", {}, ui.t(figure)), input, output);
      const set = (at, max) => {
        node.hidden = max < 1;
        input.max = max;
        if (!dragging && timer === null) input.value = at;
        tell();
      };
      return { node, set };
    }
    function errors() {
      const { last, median } = state.errors;
      const share = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)} %`;
      return ui.t("errors", { last: share(last), median: `${(100 * median).toFixed(1)} %` });
    }
    function tellVerdict() {
      if (!state.verdict) {
        verdict.replaceChildren(h("span", { class: "algm-dim" }, ui.busy("plan") ? ui.t("planning") : ""));
        return;
      }
      const over = state.margin < 0;
      const room = ui.t(over ? "missing" : "to spare", { bytes: formatBytes(Math.abs(state.margin)) });
      const figures = { peak: formatBytes(state.planned), limit: formatBytes(state.limit) };
      const where = ui.t("peak", { ...figures, phase: ui.t(`phase ${state.phase}`) });
      verdict.classList.toggle("is-over", over);
      verdict.title = state.notes.join("\n");
      verdict.replaceChildren(
        h("b", {}, ui.t(state.verdict)),
        h("span", {}, `· ${where} · ${room}`),
        state.estimated ? h("span", { class: "algm-dim" }, `· ${ui.t("estimated")}`) : "",
        state.errors ? h("span", { class: "algm-dim", title: ui.t("errors hint", state.errors) }, `· ${errors()}`) : "",
      );
    }
    function piece(row, nbytes, whole) {
      const text = `${ui.owner(row)} ${formatBytes(nbytes)}`;
      return h("span", {
        class: "algm-piece",
        "data-colour": row.colour,
        style: { width: `${(100 * nbytes) / whole}%` },
        title: text,
      });
    }
    function drawBars() {
      const most = Math.max(state.planned, state.measured);
      const far = state.limit > 8 * most; // a limit so far away would leave nothing to see of what is held
      const whole = far ? most * 1.1 : Math.max(most, state.limit) * 1.02;
      for (const [bar, column] of [
        [planned, "planned"],
        [measured, "measured"],
      ]) {
        const shown = state.rows.filter((row) => row[column] > 0);
        bar.replaceChildren(...shown.map((row) => piece(row, row[column], whole)));
        const spoken = shown.map((row) => `${ui.owner(row)} ${formatBytes(row[column])}`).join(", ");
        bar.setAttribute("aria-label", `${ui.t(column)}: ${spoken}`);
      }
      limit.hidden = far;
      limit.style.left = `${(100 * state.limit) / whole}%`;
      limitWord.textContent = ui.t(`limit ${state.by}`, { bytes: formatBytes(state.limit) });
      limitWord.title = ui.t(`limit ${state.by} hint`);
      plannedBytes.textContent = formatBytes(state.planned);
      measuredBytes.textContent = formatBytes(state.measured);
      legend.replaceChildren(...state.rows.map(item), h("li", { class: "algm-total" }, limitWord));
    }
    function item(row) {
      const differs = Math.abs(row.measured - row.planned) > 0.05 * row.planned;
      const other = row.measured && differs ? ui.t("now too", { bytes: formatBytes(row.measured) }) : null;
      return h(
        "li",
        {},
        swatch(row.colour),
        h("span", {}, ui.owner(row)),
        h("b", {}, formatBytes(row.planned)),
        other ? h("span", { class: "algm-dim" }, `(${other})`) : null,
      );
    }
    function alternative(one) {
      const costs = one.costs.map((cost) => ui.t(`cost ${cost}`)).join("; ");
      const measured = one.measured.map((switched) => ui.t(`measured ${switched}`)).join("\n");
      const apply = button(ui.t("apply"), {
        title: one.reload ? ui.t("reload hint", { change: one.change }) : ui.t("apply hint", { change: one.change }),
        onClick: () => {
          apply.disabled = true;
          ui.send("apply", { change: one.change });
        },
      });
      apply.disabled = one.reload || ui.busy(`apply ${one.change}`) || !state.control;
      return h(
        "div",
        { class: "algm-alternative", "data-fits": String(one.fits) },
        h(
          "span",
          { class: "algm-flow" },
          h("code", {}, one.change),
          h("span", { class: "algm-dim" }, costs),
          one.lossy ? h("span", { class: "algm-lossy", title: measured || ui.t("lossy hint") }, ui.t("lossy")) : null,
        ),
        h("span", { class: "algm-dim algm-num" }, ui.t("needs", { bytes: formatBytes(one.nbytes) })),
        apply,
      );
    }
    // Drawn anew only when something changed: a button under the pointer stays the same.
    function drawAlternatives() {
      const busy = (ui.model.get("busy") ?? []).filter((key) => key !== "plan" || !state.alternatives.length);
      const key = JSON.stringify([state.alternatives, busy]);
      if (key === held) return;
      held = key;
      const found = state.alternatives;
      if (!found.length && !ui.busy("plan")) return list.replaceChildren();
      const word = !found.length ? "looking" : found.some((one) => one.fits) ? "what would" : "what would help";
      return list.replaceChildren(h("div", { class: "algm-dim" }, ui.t(word)), ...found.map(alternative));
    }
    function update(next) {
      state = next;
      const at = state.steps.findIndex((step) => step >= state.context);
      sliders.context.set(at < 0 ? state.steps.length - 1 : at, state.steps.length - 1);
      sliders.images.set(state.images, state.most_images);
      sliders.conversations.set(state.conversations - 1, state.most_conversations - 1);
      tellVerdict();
      bars.hidden = legend.hidden = !state.verdict;
      list.hidden = !state.verdict || state.margin >= 0;
      if (!state.verdict) return;
      drawBars();
      drawAlternatives();
    }
    return { node, update };
  },
});
