// What to paste elsewhere to get the same settings.

export default panel({
  name: "export_panel",
  store: () => ({ shown: "yaml" }),
  build(ui) {
    let state = {};
    const pick = segmented({
      label: ui.t("title"),
      onPick: (kind) => {
        ui.shared.shown = kind;
        draw();
      },
      options: [
        ["yaml", ui.t("policy"), ui.t("policy hint")],
        ["python", "Python", ui.t("python hint")],
      ],
    });
    const text = h("pre", { class: "algm-code", tabindex: 0, "aria-label": ui.t("title") });
    const copy = button(ui.t("copy"), { title: ui.t("copy hint"), onClick: put });
    const node = h("div", { class: "algm-export" }, pick.node, text, copy);

    async function put() {
      const value = text.textContent;
      try {
        await navigator.clipboard.writeText(value);
      } catch {
        const area = h("textarea", { value, style: { position: "fixed", opacity: 0 } });
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      copy.textContent = ui.t("copied");
      setTimeout(() => {
        copy.textContent = ui.t("copy");
      }, 1500);
    }
    function draw() {
      pick.set(ui.shared.shown);
      const value = state[ui.shared.shown] ?? "";
      text.textContent = value.trim() === "{}" ? ui.t("defaults") : value.trimEnd();
    }
    return {
      node,
      update(next) {
        state = next;
        draw();
      },
    };
  },
});
