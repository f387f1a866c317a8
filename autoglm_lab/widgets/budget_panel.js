// Pretend to have a smaller card; give unused memory back by count, by share, or now.

export default panel({
  name: "budget_panel",
  store: () => ({ more: false }),
  build(ui) {
    let known = "",
      cards = null;
    const holder = h("span", {});
    const size = (what, placeholder) =>
      field({
        label: ui.t(what),
        title: ui.t(`${what} hint`),
        size: 7,
        placeholder,
        spellcheck: "false",
        onDone: (value) => ui.send(what, { [what]: value.trim() || null }),
      });
    const own = size("budget", "20GiB"),
      pinned = size("pinned", ui.t("half"));
    const number = (setting, scale, attributes) =>
      field({
        label: ui.t(setting),
        title: ui.t(`${setting} hint`),
        type: "number",
        placeholder: "–",
        ...attributes,
        onDone: (value) => ui.send("set", { setting, value: value === "" ? null : Number(value) / scale }),
      });
    const every = number("every_answers", 1, { min: 1, step: 1 });
    const share = number("cached_share", 100, { min: 1, max: 100, step: 5 });
    const tick = (setting) =>
      checkbox(ui.t(setting), {
        title: ui.t(`${setting} hint`),
        onChange: (value) => ui.send("set", { setting, value }),
      });
    const traceback = tick("traceback"),
      expandable = tick("expandable_segments");
    const now = button(ui.t("now"), {
      title: ui.t("now hint"),
      onClick: () => {
        now.disabled = true;
        ui.send("now");
      },
    });
    const back = h("span", { class: "algm-dim", role: "status" });
    const left = h("div", { class: "algm-dim algm-small algm-num algm-left", role: "status" });
    const held = h("span", { class: "algm-num" });
    const ofGpu = h(
      "div",
      {},
      row(ui.t("host"), h("span", { class: "algm-flow algm-dim" }, pinned.node, ui.t("of pinned"), held)),
      row("", expandable.node),
    );
    const node = h(
      "div",
      {},
      h("div", { class: "algm-line" }, h("h4", {}, ui.t("title")), h("span", { class: "algm-space" }), back, now),
      h("div", { class: "algm-row" }, h("span", { class: "algm-label" }, ui.t("card")), holder, own.node),
      left,
      row(ui.t("reclaim"), h("span", { class: "algm-pair algm-dim" }, ui.t("every"), every.node, ui.t("answers"))),
      row("", h("span", { class: "algm-pair algm-dim" }, ui.t("or over"), share.node, ui.t("% cached"))),
      fold(ui, ui.t("more"), [row("", traceback.node), ofGpu]),
    );

    // What a card's size, or a budget of one's own, comes to once the context has taken its part.
    function account(state) {
      if (state.budget === null) return "";
      const card = state.cards.find((one) => one.budget === state.budget);
      const room = state.budget - state.context,
        free = state.process === null ? null : state.budget - state.process;
      const parts = [];
      if (card) parts.push(ui.t("offers", { n: card.gib, bytes: formatBytes(state.budget) }));
      parts.push(ui.t("context takes", { bytes: formatBytes(state.context), left: formatBytes(Math.max(0, room)) }));
      if (free !== null)
        parts.push(ui.t(free < 0 ? "over by" : "still free", { bytes: formatBytes(Math.abs(free)) }));
      return parts.join(" · ");
    }
    function update(state) {
      const offered = JSON.stringify(state.cards);
      if (known !== offered) {
        known = offered;
        cards = segmented({
          label: ui.t("card"),
          onPick: (value) => ui.send("budget", { budget: value }),
          options: [
            ...state.cards.map(({ gib, budget }) => [
              budget,
              String(gib),
              ui.t("pretend", { n: gib, bytes: formatBytes(budget) }),
            ]),
            [0, ui.t("real"), ui.t("real hint")],
          ],
        });
        holder.replaceChildren(cards.node);
      }
      const off = (setting) => ui.busy(setting) || !state.control;
      cards.set(state.budget ?? 0, off("budget"));
      own.set(state.budget_text, off("budget"));
      left.textContent = account(state);
      left.hidden = !left.textContent;
      left.classList.toggle("is-over", state.budget !== null && state.process > state.budget);
      every.set(state.every_answers, off("every_answers"));
      share.set(state.cached_share === null ? "" : Math.round(state.cached_share * 100), off("cached_share"));
      traceback.set(state.traceback, off("traceback"));
      expandable.set(state.expandable_segments, off("expandable_segments"));
      pinned.set(state.pinned, off("pinned"));
      held.textContent = state.pinned_now ? `· ${ui.t("held now", { bytes: formatBytes(state.pinned_now) })}` : "";
      ofGpu.hidden = !state.gpu;
      now.disabled = off("now");
      back.textContent = ui.busy("now")
        ? ui.t("reclaiming")
        : state.last === null
          ? ui.t("not yet")
          : ui.t("gave back", { bytes: formatBytes(state.last) });
    }
    return { node, update };
  },
});
