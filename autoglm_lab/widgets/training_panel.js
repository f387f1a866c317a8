// The training under way or the last one with its loss, the adapters that came of it, and how training spends memory.
// It is folded while nothing is trained and there is no adapter, unless a person opens it.

const WIDE = 100,
  HIGH = 40; // of the curve's own coordinates, which stretch with the panel

export default panel({
  name: "training_panel",
  store: () => ({ more: false, open: null, active: false, asked: { method: "lora" } }),
  build(ui) {
    let state = null,
      points = [],
      asked = null;
    const set = (setting) => (value) => ui.send("set", { setting, value });
    const words = (...parts) => h("span", { class: "algm-flow algm-dim" }, ...parts);

    const status = h("span", { class: "algm-num algm-training-state", role: "status" });
    const facts = h("span", { class: "algm-flow algm-dim algm-num" });
    const stop = button(ui.t("stop"), {
      title: ui.t("stop hint"),
      kind: "algm-primary is-stop",
      onClick: () => {
        stop.disabled = true;
        ui.send("stop");
      },
    });
    const resume = button(ui.t("resume"), {
      title: ui.t("resume hint"),
      onClick: () => {
        resume.disabled = true;
        ui.send("resume");
      },
    });
    const done = h("i", {}),
      steps = h("div", { class: "algm-steps", "aria-hidden": "true" }, done);
    const line = h("path", { class: "algm-curve-line" }),
      cursor = h("line", { class: "algm-curve-cursor", y1: 0, y2: HIGH });
    const grid = [0, 0.5, 1].map((share) =>
      h("line", { class: "algm-curve-grid", x1: 0, x2: WIDE, y1: share * HIGH, y2: share * HIGH }),
    );
    const drawing = h(
      "svg",
      { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", role: "img", tabindex: 0 },
      grid,
      line,
      cursor,
    );
    const highest = h("span", {}),
      lowest = h("span", {}),
      first = h("span", {}),
      last = h("span", {}),
      under = h("span", { class: "algm-curve-read" });
    const curve = h(
      "div",
      { class: "algm-curve algm-dim algm-num" },
      h("div", { class: "algm-curve-scale" }, highest, lowest),
      drawing,
      h("div", { class: "algm-curve-steps" }, first, under, last),
    );
    const peaks = h("span", { class: "algm-flow algm-num", title: ui.t("peaks hint") });
    const peakRow = row(ui.t("peaks"), peaks);
    const note = h("div", { class: "algm-dim algm-small algm-training-note" });
    const leftOut = h("div", { class: "algm-small algm-training-left-out" });
    const ofRun = h("div", {}, h("div", { class: "algm-line" }, facts, h("span", { class: "algm-space" }), stop, resume));
    ofRun.append(steps, curve, note, peakRow, leftOut);
    const hint = h("div", { class: "algm-dim algm-empty" }, ui.t("none"), ". ", h("code", {}, ui.t("begin")));

    const on = checkbox("", { title: ui.t("on hint"), onChange: (value) => ui.send("switch", { on: value }) });
    const nbytes = h("span", { class: "algm-dim algm-num" });
    const folder = h("input", {
      type: "text",
      class: "algm-field algm-folder",
      size: 14,
      spellcheck: "false",
      "aria-label": ui.t("folder"),
      title: ui.t("folder"),
    });
    const act = (what, send) => button(ui.t(what), { title: ui.t(`${what} hint`), onClick: send });
    const save = act("save", () => ui.send("save", { folder: folder.value || folder.placeholder }));
    const merge = act("merge", () => ask("merge")),
      remove = act("remove", () => ask("remove"));
    const saved = h("div", { class: "algm-dim algm-small algm-training-note" });
    const question = h("div", { class: "algm-question", role: "alertdialog", hidden: true });
    const ofAdapters = h(
      "div",
      { class: "algm-training-adapters" },
      row(ui.t("adapters"), h("span", { class: "algm-flow" }, on.node, nbytes)),
      row("", h("span", { class: "algm-flow" }, folder, save, merge, remove)),
      saved,
      question,
    );

    const choice = (setting, values) =>
      segmented({
        label: ui.t(setting),
        onPick: set(setting),
        options: values.map((value) => [value, ui.t(`${setting} ${value}`), ui.t(`${setting} ${value} hint`)]),
      });
    const count = (setting, least, { scale = 1, ...limits } = {}) =>
      field({
        label: ui.t(`${setting} hint`),
        type: "number",
        min: least,
        step: 1,
        ...limits,
        onDone: (value) => set(setting)(Number(value) / scale),
      });
    // What a training is begun with stays as it was typed, in every view.
    const typed = (name, attributes = {}) => {
      const box = field({ label: ui.t(`${name} hint`), onDone: (value) => (ui.shared.asked[name] = value), ...attributes });
      box.set(ui.shared.asked[name]);
      return box;
    };
    const data = typed("data", { size: 24, spellcheck: "false", placeholder: "train.jsonl" }),
      out = typed("out", { size: 24, spellcheck: "false" }),
      rank = typed("rank", { type: "number", min: 1, step: 1, placeholder: "16" }),
      epochs = typed("epochs", { type: "number", min: 0, step: "any", placeholder: "1" }),
      budget = typed("budget", { size: 10, spellcheck: "false" });
    const method = segmented({
      label: ui.t("method"),
      onPick: (value) => (ui.shared.asked.method = value),
      options: ["lora", "full"].map((value) => [value, ui.t(`method ${value}`), ui.t(`method ${value} hint`)]),
    });
    method.set(ui.shared.asked.method);
    const start = button(ui.t("start"), {
      title: ui.t("start hint"),
      kind: "algm-primary",
      onClick: () => {
        start.disabled = true;
        ui.send("begin", { asked: ui.shared.asked });
      },
    });

    const again = choice("checkpointing", ["auto", "none", "every-k", "every-layer"]);
    const every = count("every", 1),
      offload = count("offload", 0, { scale: 100, max: 100 }),
      chunk = count("loss_chunk", 16),
      micro = count("micro_batch", 1),
      accumulation = count("accumulation", 1);
    const optimizer = choice("optimizer", ["adamw", "adamw-8bit"]);
    const inexact = h("span", { class: "algm-lossy", title: ui.t("lossy hint") }, ui.t("lossy"));
    const features = checkbox(ui.t("cache_features"), {
      title: ui.t("cache_features hint"),
      onChange: set("cache_features"),
    });
    const everyRow = row("", words(ui.t("every"), every.node)),
      batch = h("span", {});
    const begin = h(
      "div",
      { class: "algm-training-begin" },
      row(ui.t("data"), data.node),
      row(ui.t("method"), h("span", { class: "algm-flow" }, method.node, words(ui.t("rank"), rank.node))),
      row("", words(epochs.node, ui.t("epochs"))),
      row(ui.t("budget"), budget.node),
      row(ui.t("out"), out.node),
      row(ui.t("checkpointing"), again.node),
      everyRow,
      row("", start),
    );
    const more = fold(ui, ui.t("settings"), [
      h("div", { class: "algm-dim algm-small" }, ui.t("settings hint")),
      row(ui.t("offload"), words(offload.node, ui.t("% kept"))),
      row(ui.t("loss_chunk"), words(chunk.node, ui.t("at a time"))),
      row(ui.t("batch"), words(micro.node, "×", accumulation.node, batch)),
      row(ui.t("optimizer"), h("span", { class: "algm-flow" }, optimizer.node, inexact)),
      row("", features.node),
    ]);
    const summary = h(
      "summary",
      { onclick: () => (ui.shared.open = !node.open) },
      h("h4", {}, ui.t("title")),
      status,
    );
    const node = h("details", { class: "algm-training" }, summary, hint, ofRun, ofAdapters, begin, more);

    // What cannot be taken back is asked once more, in its place.
    function ask(what) {
      asked = what;
      question.hidden = !what;
      if (!what) return;
      const no = button(ui.t("keep"), { onClick: () => ask(null) });
      const yes = button(ui.t(what), {
        title: ui.t(`${what} hint`),
        kind: "algm-primary is-stop",
        onClick: () => {
          ask(null);
          ui.send(what);
        },
      });
      question.replaceChildren(h("span", {}, ui.t(`${what} sure`)), yes, no);
      no.focus();
    }
    function tellRun(run) {
      const named = run.stopping && !run.ended ? "stopping" : run.state;
      status.replaceChildren(
        h("b", {}, ui.t(`state ${named}`)),
        h("span", {}, `· ${ui.t("steps", run)}`),
        run.loss === null ? "" : h("span", { title: ui.t("loss hint") }, `· ${ui.t("loss", { loss: short(run.loss) })}`),
      );
      status.dataset.state = run.state;
      const told = [run.name];
      if (run.seconds) told.push(ui.t(run.ended ? "took in all" : "took", { time: formatSeconds(run.seconds) }));
      if (run.left) told.push(ui.t("left", { time: formatSeconds(run.left).replace(".0", "") }));
      facts.replaceChildren(
        h("span", {}, told.join(" · ")),
        run.rate ? h("span", { title: ui.t("rate hint") }, `· ${ui.t("rate", { n: formatCount(run.rate) })}`) : "",
      );
      stop.hidden = run.ended;
      stop.disabled = run.stopping;
      resume.hidden = !run.resumable;
      resume.disabled = ui.busy("resume");
      done.style.width = `${(100 * run.step) / Math.max(1, run.steps)}%`;
      steps.hidden = run.state === "done";
      note.textContent = run.note;
      note.hidden = !run.note;
      note.classList.toggle("is-over", run.state === "failed");
      peaks.replaceChildren(
        ...Object.entries(run.peaks).map(([phase, bytes]) =>
          h("span", {}, ui.t(`peak ${phase}`, { bytes: formatBytes(bytes) })),
        ),
      );
      peakRow.hidden = !Object.keys(run.peaks).length;
      leftOut.hidden = !run.left_out;
      leftOut.textContent = ui.t("left out", { n: run.left_out, first: run.problems[0] ?? "" });
      leftOut.title = run.problems.join("\n");
    }
    function drawCurve(run) {
      points = run.curve.filter(([, loss]) => loss !== null);
      curve.hidden = points.length < 2;
      if (curve.hidden) return;
      const losses = points.map(([, loss]) => loss);
      const most = Math.max(...losses),
        least = Math.min(0, ...losses);
      const y = (loss) => HIGH - (HIGH * (loss - least)) / Math.max(most - least, 1e-9);
      let pen = "M"; // a loss that was no number leaves a gap
      const path = [];
      for (const [step, loss] of run.curve) {
        if (loss !== null) path.push(`${pen}${x(step).toFixed(2)} ${y(loss).toFixed(2)}`);
        pen = loss === null ? "M" : "L";
      }
      line.setAttribute("d", path.join(""));
      highest.textContent = short(most);
      lowest.textContent = short(least);
      first.textContent = String(points[0][0]);
      last.textContent = String(run.ended ? points.at(-1)[0] : run.steps);
      drawing.setAttribute("aria-label", ui.t("curve", { first: short(losses[0]), last: short(losses.at(-1)) }));
    }
    // A training under way shows how much of its way is left.
    function x(step) {
      const from = points[0][0],
        to = state.run.ended ? points.at(-1)[0] : state.run.steps;
      return (WIDE * (step - from)) / Math.max(1, to - from);
    }
    const short = (loss) => (loss === 0 || Math.abs(loss) >= 10 ? loss.toFixed(1) : loss.toPrecision(3));
    function read(event) {
      const box = drawing.getBoundingClientRect();
      const at = (WIDE * (event.clientX - box.left)) / Math.max(1, box.width);
      const near = points.reduce((best, one) => (Math.abs(x(one[0]) - at) < Math.abs(x(best[0]) - at) ? one : best));
      cursor.setAttribute("x1", x(near[0]));
      cursor.setAttribute("x2", x(near[0]));
      drawing.classList.add("is-read");
      under.textContent = ui.t("at step", { step: near[0], loss: short(near[1]) });
    }
    drawing.addEventListener("pointermove", read);
    drawing.addEventListener("pointerleave", () => {
      drawing.classList.remove("is-read");
      under.textContent = "";
    });
    function tellAdapters() {
      const training = state.run !== null && !state.run.ended;
      const off = training || ["switch", "merge", "remove", "save"].some(ui.busy);
      on.node.lastChild.textContent = ui.t("on", { names: state.adapters.join(", ") });
      on.set(state.on, off);
      nbytes.textContent = formatBytes(state.nbytes);
      folder.placeholder = `adapters/${state.adapters[0] ?? "mine"}`;
      for (const one of [folder, save, merge, remove]) one.disabled = off;
      if (asked && off) ask(null);
      saved.textContent = state.saved ? ui.t("saved", { folder: state.saved }) : "";
      saved.hidden = !state.saved;
    }
    function tellSettings(settings) {
      again.set(settings.checkpointing, ui.busy("checkpointing"));
      everyRow.hidden = settings.checkpointing !== "every-k";
      every.set(settings.every, ui.busy("every"));
      offload.set(Math.round(100 * settings.offload), ui.busy("offload"));
      chunk.set(settings.loss_chunk, ui.busy("loss_chunk"));
      micro.set(settings.micro_batch, ui.busy("micro_batch"));
      accumulation.set(settings.accumulation, ui.busy("accumulation"));
      batch.textContent = ui.t("a batch", { n: settings.micro_batch * settings.accumulation });
      optimizer.set(settings.optimizer, ui.busy("optimizer"));
      inexact.hidden = settings.optimizer === "adamw";
      features.set(settings.cache_features, ui.busy("cache_features"));
    }
    function update(next) {
      state = next;
      if (state.hidden) return;
      if (state.active !== ui.shared.active) ui.shared.open = null; // as it was left only while nothing changes
      ui.shared.active = state.active;
      node.open = ui.shared.open ?? state.active;
      hint.hidden = state.run !== null || state.adapters.length > 0;
      ofRun.hidden = state.run === null;
      ofAdapters.hidden = !state.adapters.length;
      begin.hidden = state.run !== null && !state.run.ended;
      start.disabled = ui.busy("begin");
      budget.node.placeholder = state.budget || ui.t("budget none");
      if (state.run) {
        tellRun(state.run);
        drawCurve(state.run);
      } else status.replaceChildren(h("span", { class: "algm-dim" }, state.adapters.join(", ") || ui.t("none")));
      if (state.adapters.length) tellAdapters();
      else ask(null);
      tellSettings(state.settings);
    }
    return { node, update };
  },
});
