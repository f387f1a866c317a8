// The last events, newest first. The list is folded to a few lines; it scrolls.

export default panel({
  name: "events_panel",
  build(ui) {
    const list = h("ol", { class: "algm-events", tabindex: 0, "aria-label": ui.t("title") });
    const node = h("div", {}, h("h4", {}, ui.t("title")), list);

    function line(event) {
      const bytes = event.nbytes || event.kind === "reclaimed" ? formatBytes(event.nbytes ?? 0) : "";
      const took = event.seconds !== null ? formatSeconds(event.seconds) : "";
      return h(
        "li",
        { "data-kind": event.kind, title: `${eventText(ui, event)}${event.why ? `\n${event.why}` : ""}` },
        h("time", { class: "algm-dim" }, new Date(event.time * 1000).toLocaleTimeString("en-GB")),
        h("span", { class: "algm-icon-cell", "aria-hidden": "true" }, ICONS[event.kind] ?? "◦"),
        h(
          "span",
          { class: "algm-what" },
          event.kind === "note" ? "" : `${ui.t(`event ${event.kind}`)} `,
          event.subject,
          event.why ? h("span", { class: "algm-dim" }, ` · ${event.why}`) : null,
          event.times > 1 ? h("span", { class: "algm-dim" }, ` ×${event.times}`) : null,
        ),
        h("span", { class: "algm-dim algm-num" }, took),
        h("span", { class: "algm-num" }, event.kind === "reclaimed" ? ui.t("gained", { bytes }) : bytes),
      );
    }
    let shown = "";
    function update(state) {
      const key = JSON.stringify(state.events);
      if (key === shown) return;
      shown = key;
      list.replaceChildren(...state.events.map(line));
    }
    return { node, update };
  },
});
