// Memory over time on a canvas, drawn in an animation frame, and only after a change. The store and the painting stand
// in plot_store.js and plot_picture.js.

const WINDOWS = [
  [30, "30 s"],
  [120, "2 min"],
  [0, "all"],
];

export default panel({
  name: "live_plot",
  store: openStore,
  build(ui) {
    const store = ui.shared;
    let state = { series: [], total: 0 },
      hover = null,
      waiting = false,
      visible = true;
    const canvas = h("canvas", { class: "algm-canvas", role: "img", tabindex: 0, "aria-label": ui.t("title") });
    const tip = h("div", { class: "algm-tip", hidden: true });
    const scopes = segmented({
      label: ui.t("magnify"),
      onPick: (scope) => {
        store.scope = scope;
        wake();
      },
      options: ["model", "process", "device"].map((s) => [s, ui.t(`scope ${s}`), ui.t(`scope ${s} hint`)]),
    });
    const windows = segmented({
      label: ui.t("window"),
      onPick: (seconds) => {
        store.window = seconds;
        wake();
      },
      options: WINDOWS.map(([s, text]) => [s, s ? text : ui.t("all"), ui.t("window")]),
    });
    const pause = button(ui.t("pause"), {
      title: ui.t("pause hint"),
      onClick: () => {
        store.paused = store.paused === null ? (store.samples.at(-1)?.time ?? null) : null;
        wake();
      },
    });
    const save = button(ui.t("save"), { title: ui.t("save hint"), onClick: savePicture });
    const stage = h("div", { class: "algm-stage" }, canvas, tip);
    const picture = plotPicture(ui, store, stage);
    const node = h(
      "div",
      {},
      h(
        "div",
        { class: "algm-line" },
        h("h4", {}, ui.t("title")),
        h("span", { class: "algm-space" }),
        scopes.node,
        windows.node,
        pause,
        save,
      ),
      stage,
    );

    function wake() {
      if (waiting || !visible || document.hidden) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        try {
          draw();
        } catch (error) {
          ui.fail(error);
        }
      });
    }
    function draw() {
      const width = stage.clientWidth,
        height = stage.clientHeight,
        ratio = window.devicePixelRatio || 1;
      if (!width || !height) return;
      if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
      }
      const shot = picture.paint(canvas.getContext("2d"), width, height, ratio, true, hover);
      scopes.set(shot.scope);
      windows.set(store.window);
      pause.textContent = store.paused === null ? ui.t("pause") : ui.t("go on");
      pause.setAttribute("aria-pressed", String(store.paused !== null));
      showTip(shot);
    }
    function showTip(shot) {
      if (hover === null || !shot.shown.length) {
        tip.hidden = true;
        return;
      }
      let sample = shot.shown[0];
      for (const one of shot.shown)
        if (Math.abs(shot.x(one.time) - hover) < Math.abs(shot.x(sample.time) - hover)) sample = one;
      const lines = state.series
        .map((_, i) => i)
        .sort(picture.byRank)
        .reverse()
        .map((i) => [state.series[i], picture.value(sample, i)])
        .filter(([, v]) => v !== 0);
      const ago = Math.max(0, shot.end - sample.time);
      const near = store.events.filter((event) => Math.abs(shot.x(event.time) - hover) < 6).slice(-4);
      const budget = sample.values[1];
      tip.replaceChildren(
        ...solid([
          h(
            "div",
            { class: "algm-dim" },
            `${new Date(sample.time * 1000).toLocaleTimeString()} · ${ui.t("ago", { seconds: formatSeconds(ago) })}`,
          ),
          h(
            "div",
            { class: "algm-tip-row" },
            h("span", {}),
            h("b", {}, ui.t("mark process")),
            h("b", {}, formatBytes(sample.values[0])),
          ),
          lines.map(([series, v]) =>
            h(
              "div",
              { class: "algm-tip-row" },
              swatch(series.colour),
              h("span", {}, ui.owner(series)),
              h("span", {}, formatBytes(v)),
            ),
          ),
          budget === budget
            ? h(
                "div",
                { class: "algm-tip-row" },
                h("span", {}),
                h("span", {}, ui.t("mark budget")),
                h("span", {}, formatBytes(budget)),
              )
            : null,
          near.map((event) =>
            h(
              "div",
              {},
              `${ICONS[event.kind] ?? "◦"} ${eventText(ui, event)}${event.why ? ` (${event.why})` : ""}`,
            ),
          ),
        ]),
      );
      tip.hidden = false;
      const right = hover + 14 + tip.offsetWidth > stage.clientWidth;
      tip.style.left = `${right ? Math.max(0, hover - 14 - tip.offsetWidth) : hover + 14}px`;
      tip.style.top = "18px";
    }
    function point(event) {
      hover = event.clientX - canvas.getBoundingClientRect().left;
      wake();
    }
    function leave() {
      hover = null;
      wake();
    }
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -8, ArrowRight: 8 }[event.key];
      if (step) {
        hover = Math.min(stage.clientWidth - 8, Math.max(46, (hover ?? stage.clientWidth - 20) + step));
        event.preventDefault();
        wake();
      }
      if (event.key === "Escape") leave();
    });
    function savePicture() {
      const sheet = h("canvas", { width: stage.clientWidth * 2, height: stage.clientHeight * 2 });
      picture.paint(sheet.getContext("2d"), stage.clientWidth, stage.clientHeight, 2, false);
      const link = h("a", { href: sheet.toDataURL("image/png"), download: "memory.png" });
      link.click();
    }

    const size = new ResizeObserver(wake),
      seen = new IntersectionObserver(([entry]) => {
        visible = entry.isIntersecting;
        wake();
      });
    const theme = new MutationObserver(wake);
    size.observe(stage);
    seen.observe(stage);
    for (const root of [document.body, document.documentElement]) theme.observe(root, { attributes: true });
    document.addEventListener("visibilitychange", wake);
    store.views.add(wake);
    return {
      node,
      update(next) {
        state = next;
        picture.show(next);
        wake();
      },
      gone() {
        size.disconnect();
        seen.disconnect();
        theme.disconnect();
        document.removeEventListener("visibilitychange", wake);
        store.views.delete(wake);
      },
    };
  },
});
