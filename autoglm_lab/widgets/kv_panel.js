// The limit of the KV cache, what happens when it is full, and the conversations kept in it.

export default panel({
  name: "kv_panel",
  build(ui) {
    let state = null,
      dragging = false;
    const slider = h("input", {
      type: "range",
      min: 0,
      step: 1,
      class: "algm-slider",
      "aria-label": ui.t("limit"),
      title: ui.t("limit hint"),
      oninput: () => {
        dragging = true;
        tell(at(slider.value));
      },
      onchange: () => {
        dragging = false;
        ui.send("set", { setting: "max_tokens", value: at(slider.value) });
      },
    });
    const figure = h("output", { class: "algm-num" });
    const full = segmented({
      label: ui.t("when full"),
      onPick: (value) => ui.send("set", { setting: "overflow", value }),
      options: ["drop-oldest-turns", "stop", "refuse"].map((o) => [
        o,
        ui.t(`overflow ${o}`),
        ui.t(`overflow ${o} hint`),
      ]),
    });
    const reuse = checkbox(ui.t("reuse"), {
      title: ui.t("reuse hint"),
      onChange: (value) => ui.send("set", { setting: "reuse", value }),
    });
    const most = field({
      label: ui.t("max conversations"),
      type: "number",
      min: 1,
      step: 1,
      onDone: (value) => ui.send("set", { setting: "max_conversations", value: Number(value) }),
    });
    const list = h("div", { class: "algm-conversations" });
    const node = h(
      "div",
      {},
      h("h4", {}, ui.t("title")),
      h("div", { class: "algm-row" }, h("span", { class: "algm-label" }, ui.t("limit")), slider, figure),
      row(ui.t("when full"), full.node),
      h(
        "div",
        { class: "algm-row" },
        h("span", { class: "algm-label" }, ui.t("between turns")),
        reuse.node,
        h("span", { class: "algm-space" }),
        h("span", { class: "algm-pair algm-dim" }, ui.t("at most"), most.node),
      ),
      list,
    );

    const at = (index) => state.steps[Number(index)] ?? null;
    function tell(tokens) {
      const limit = tokens ?? state.context;
      const parts = [tokens === null ? ui.t("no limit") : ui.t("tokens", { n: formatCount(tokens) })];
      if (state.token_bytes && limit) parts.push(formatBytes(state.token_bytes * limit));
      slider.style.setProperty("--algm-fill", `${(100 * slider.value) / Math.max(1, slider.max)}%`);
      figure.textContent = parts.join(" · ");
      slider.setAttribute("aria-valuetext", figure.textContent);
    }
    function conversation(one) {
      const busy = ui.busy(`drop ${one.name}`);
      const reused = one.reused_share === null ? "" : ui.t("reused", { share: Math.round(100 * one.reused_share) });
      return h(
        "div",
        { class: "algm-conversation" },
        h("span", { class: "algm-name", title: one.name }, one.name),
        h(
          "span",
          { class: "algm-dim algm-num" },
          `${ui.t("tokens", { n: formatCount(one.tokens) })} · ${formatBytes(one.kv_bytes)}`,
        ),
        h("span", { class: "algm-dim algm-num" }, one.busy ? ui.t("busy") : reused),
        button(ui.t("drop"), {
          title: ui.t("drop hint", { name: one.name }),
          kind: busy || one.busy ? "is-busy" : "",
          onClick: (event) => {
            event.target.disabled = true;
            ui.send("drop", { conversation: one.name });
          },
        }),
      );
    }
    let listed = "";
    function update(next) {
      state = next;
      const index =
        state.max_tokens === null ? state.steps.length : state.steps.findIndex((step) => step >= state.max_tokens);
      slider.max = state.steps.length;
      slider.disabled = ui.busy("max_tokens") || !state.control;
      if (!dragging) {
        slider.value = index < 0 ? state.steps.length : index;
        tell(state.max_tokens);
      }
      full.set(state.overflow, ui.busy("overflow") || !state.control);
      reuse.set(state.reuse, ui.busy("reuse") || !state.control);
      most.set(state.max_conversations, ui.busy("max_conversations") || !state.control);
      const key = JSON.stringify([state.conversations, ui.model.get("busy")]);
      if (key !== listed) {
        listed = key;
        list.replaceChildren(
          ...(state.conversations.length
            ? state.conversations.map(conversation)
            : [h("div", { class: "algm-dim algm-empty" }, ui.t("no conversations"))]),
        );
        for (const one of list.querySelectorAll("button.is-busy")) one.disabled = true;
      }
    }
    return { node, update };
  },
});
