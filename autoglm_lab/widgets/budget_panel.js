// Pretend to have a smaller card; give unused memory back by count, by share, or now.

export default panel({
  name: "budget_panel",
  build(ui) {
    let state = null,
      presets = "",
      cards = null;
    const holder = h("span", {});
    const own = field({
      label: ui.t("budget"),
      title: ui.t("budget hint"),
      size: 8,
      placeholder: "24GiB",
      spellcheck: "false",
      onDone: (value) => ui.send("budget", { budget: value.trim() || null }),
    });
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
    const now = button(ui.t("now"), {
      title: ui.t("now hint"),
      onClick: () => {
        now.disabled = true;
        ui.send("now");
      },
    });
    const back = h("span", { class: "algm-dim", role: "status" });
    const node = h(
      "div",
      {},
      h("div", { class: "algm-line" }, h("h4", {}, ui.t("title")), h("span", { class: "algm-space" }), back, now),
      row(ui.t("card"), holder, own.node),
      row(ui.t("reclaim"), h("span", { class: "algm-pair algm-dim" }, ui.t("every"), every.node, ui.t("answers"))),
      row("", h("span", { class: "algm-pair algm-dim" }, ui.t("or over"), share.node, ui.t("% cached"))),
    );

    function size(nbytes) {
      return Number((nbytes / 2 ** 30).toFixed(2));
    }
    function update(next) {
      state = next;
      if (presets !== String(state.presets)) {
        presets = String(state.presets);
        cards = segmented({
          label: ui.t("card"),
          onPick: (value) => ui.send("budget", { budget: value }),
          options: [
            ...state.presets.map((n) => [n, String(size(n)), ui.t("pretend", { n: size(n) })]),
            [0, ui.t("real"), ui.t("real hint")],
          ],
        });
        holder.replaceChildren(cards.node);
      }
      const off = ui.busy("budget") || !state.control;
      cards.set(state.budget ?? 0, off);
      own.set(state.budget ? `${size(state.budget)}GiB` : "", off);
      every.set(state.every_answers, ui.busy("every_answers") || !state.control);
      share.set(
        state.cached_share === null ? "" : Math.round(state.cached_share * 100),
        ui.busy("cached_share") || !state.control,
      );
      now.disabled = ui.busy("now") || !state.control;
      back.textContent = ui.busy("now")
        ? ui.t("reclaiming")
        : state.last === null
          ? ui.t("not yet")
          : ui.t("gave back", { bytes: formatBytes(state.last) });
    }
    return { node, update };
  },
});
