// The model, what it is doing, the language, Stop; and whether the kernel still answers.

export default panel({
  name: "header",
  bare: true,
  store(model) {
    const link = { last: 0, alive: null };
    model.on("msg:custom", (message) => {
      if (message.kind === "beat") link.last = Date.now();
    });
    const id = model.get("comm_id"),
      models = model.widget_manager;
    if (id && models?.has_model?.(id))
      models.get_model(id).then((real) => {
        link.alive = () => real.comm_live !== false;
      });
    return link;
  },
  build(ui) {
    const title = h("strong", { class: "algm-title" });
    const detail = h("span", { class: "algm-dim" });
    const dot = h("span", { class: "algm-dot", "aria-hidden": "true" });
    const phase = h("span", {});
    const pill = h("span", { class: "algm-pill", role: "status" }, dot, phase);
    const lang = button(ui.t("other language"), { title: ui.t("change language"), onClick: () => ui.send("language") });
    const stop = button(`■ ${ui.t("stop")}`, {
      title: ui.t("stop hint"),
      kind: "algm-stop",
      onClick: () => ui.send("stop"),
    });
    const node = h("div", { class: "algm-head" }, title, detail, h("span", { class: "algm-space" }), pill, lang, stop);

    let state = {};
    function draw() {
      const lost = isLost();
      const down = lost || state.closed;
      title.textContent = state.model ?? "";
      detail.textContent = state.detail ?? "";
      pill.dataset.phase = lost ? "lost" : state.closed ? "closed" : state.phase;
      phase.textContent = lost
        ? ui.t("disconnected")
        : state.closed
          ? ui.t("closed")
          : state.phase === "idle" && state.rate
            ? ui.t("last rate", { rate: Math.round(state.rate) })
            : ui.t(`phase ${state.phase}`) +
              (state.phase === "decode" && state.rate ? ` · ${Math.round(state.rate)} tok/s` : "");
      pill.title = lost ? ui.t("disconnected hint") : ui.t("phase hint");
      stop.disabled = down || state.phase === "idle";
      lang.disabled = down;
      const board = node.closest(".algm-dashboard");
      board?.classList.toggle("is-down", Boolean(down));
      swapStill(board, lost && !ui.shared.last);
    }
    function isLost() {
      if (ui.shared.alive && !ui.shared.alive()) return true;
      return ui.shared.last > 0 && !state.closed && Date.now() - ui.shared.last > 12000;
    }
    // The static picture beside the dashboard is for pages without a kernel; where there is one it gives way, and
    // where there never was one the dashboard does.
    function swapStill(board, dead) {
      if (!/^[0-9a-f]+$/.test(state.still ?? "")) return;
      const stills = document.querySelectorAll(`.algm-still-${state.still}`);
      if (board && stills.length) board.style.display = dead ? "none" : "";
      if (!dead) for (const still of stills) (still.closest(".jp-OutputArea-child") ?? still).style.display = "none";
    }
    const timer = setInterval(draw, 1000);
    ui.send("view", { open: true });
    return {
      node,
      update(next) {
        state = next;
        draw();
      },
      gone() {
        clearInterval(timer);
        ui.send("view", { open: false });
      },
    };
  },
});
