// How the live plot is painted: stacked by owner, with the process line, the budget line and the events.

function plotPicture(ui, store, root) {
  let state = { series: [], total: 0 };
  const inside = (series, scope) =>
    ["model", "process", "device"].indexOf(series.scope) <= ["model", "process", "device"].indexOf(scope);
  const value = (sample, column) => {
    const v = sample.values[FIXED + column];
    return v === v && v !== undefined ? v : 0;
  };
  const stack = (sample, columns) => columns.reduce((sum, column) => sum + Math.max(0, value(sample, column)), 0);

  const byRank = (a, b) =>
    state.series[a].rank[0] - state.series[b].rank[0] || state.series[a].rank[1] - state.series[b].rank[1] || a - b;
  function suggested() {
    const last = store.samples.at(-1);
    if (!last) return "device";
    const of = (scope) =>
      stack(
        last,
        state.series.map((s, i) => (inside(s, scope) ? i : -1)).filter((i) => i >= 0),
      );
    if (of("model") >= state.total / 8) return "device";
    return of("model") >= of("process") / 8 ? "process" : "model";
  }
  // What the frame shows: the samples of the window, one for each pixel column (the highest), and the scales.
  function frame(width, height) {
    const scope = store.scope ?? suggested();
    const columns = state.series
      .map((s, i) => (inside(s, scope) ? i : -1))
      .filter((i) => i >= 0)
      .sort(byRank);
    const box = { left: 46, right: width - 8, top: 20, bottom: height - 50 };
    const end = store.paused ?? store.samples.at(-1)?.time ?? Date.now() / 1000;
    const first = store.samples[0]?.time ?? end - 1;
    const start = Math.min(end - 15, Math.max(first, store.window ? end - store.window : first));
    const x = (time) => box.left + ((box.right - box.left) * (time - start)) / (end - start);
    const shown = [];
    let pixel = null,
      seen = null;
    for (const sample of store.samples) {
      if (sample.time < start - GAP || sample.time > end) continue;
      const at = Math.round(x(sample.time)),
        height = stack(sample, columns);
      if (at !== pixel || (seen && sample.time - seen > GAP)) shown.push({ sample, height });
      else if (height >= shown.at(-1).height) shown[shown.length - 1] = { sample, height };
      pixel = at;
      seen = sample.time;
    }
    const highest = Math.max(1024, ...shown.map((s) => s.height));
    const budget = store.samples.at(-1)?.values[1];
    const fits = budget === budget && budget < highest * 1.6;
    const most = scope === "device" ? state.total : Math.max(highest, scope === "process" && fits ? budget : 0) * 1.12;
    const y = (bytes) => box.bottom - ((box.bottom - box.top) * bytes) / most;
    return { scope, columns, box, start, end, x, y, shown: shown.map((s) => s.sample), most };
  }

  function inks() {
    const style = getComputedStyle(root),
      of = (name) => style.getPropertyValue(name).trim();
    return {
      ink: of("--algm-ink"),
      dim: of("--algm-dim"),
      line: of("--algm-line"),
      card: of("--algm-card"),
      danger: of("--algm-danger"),
      font: style.fontFamily,
      owner: (key) => of(`--algm-c-${key}`),
    };
  }
  // On the page (`live`) the background is the page's and the pointer is drawn; a saved picture brings its own background.
  function paint(g, width, height, ratio, live, hover = null) {
    const c = inks(),
      shot = frame(width, height),
      { box, x, y } = shot;
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    if (!live) {
      g.fillStyle = c.card;
      g.fillRect(0, 0, width, height);
    }
    g.font = `11px ${c.font}`;
    axes(g, c, shot);
    g.save();
    g.beginPath();
    g.rect(box.left, box.top - 14, box.right - box.left, box.bottom - box.top + 14);
    g.clip();
    for (const run of runs(shot.shown)) areas(g, c, shot, run);
    level(g, c, shot, 0, c.ink, [], "mark process");
    level(g, c, shot, 1, c.danger, [5, 4], "mark budget");
    g.restore();
    markers(g, c, shot);
    if (live && hover !== null) {
      g.strokeStyle = c.dim;
      g.setLineDash([2, 2]);
      g.beginPath();
      g.moveTo(hover, box.top);
      g.lineTo(hover, box.bottom);
      g.stroke();
      g.setLineDash([]);
    }
    if (!shot.shown.length) {
      g.fillStyle = c.dim;
      g.textAlign = "center";
      g.fillText(ui.t("waiting"), (box.left + box.right) / 2, (box.top + box.bottom) / 2);
    }
    return shot;
  }
  function axes(g, c, { box, y, most, start, end, x }) {
    const scale = ticks(most);
    g.strokeStyle = c.line;
    g.fillStyle = c.dim;
    g.lineWidth = 1;
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const [bytes, text] of scale.list) {
      const at = Math.round(y(bytes)) + 0.5;
      g.beginPath();
      g.moveTo(box.left, at);
      g.lineTo(box.right, at);
      g.stroke();
      g.fillText(text, box.left - 6, at);
    }
    g.textBaseline = "alphabetic";
    g.fillText(scale.name, box.left - 6, box.top - 9);
    const span = end - start,
      step = [1, 2, 5, 10, 30, 60, 120, 300, 600].find((s) => span / s <= 7) ?? 1200;
    g.textAlign = "center";
    for (let ago = 0; ago <= span; ago += step) {
      const at = x(end - ago);
      if (at < box.left + 16) break;
      g.textAlign = ago ? "center" : "right";
      g.fillText(
        ago
          ? `−${ago >= 60 ? `${ago / 60} min` : `${ago} s`}`
          : store.paused === null
            ? ui.t("axis now")
            : ui.t("paused"),
        at,
        box.bottom + 13,
      );
    }
  }
  function runs(shown) {
    const list = [];
    for (const sample of shown) {
      if (!list.length || sample.time - list.at(-1).at(-1).time > GAP) list.push([]);
      list.at(-1).push(sample);
    }
    return list;
  }
  function areas(g, c, { columns, x, y }, run) {
    let base = run.map(() => 0);
    for (const column of columns) {
      const tops = run.map((sample, i) => base[i] + Math.max(0, value(sample, column)));
      if (tops.some((top, i) => top > base[i])) {
        g.beginPath();
        run.forEach((sample, i) => g[i ? "lineTo" : "moveTo"](x(sample.time), y(tops[i])));
        for (let i = run.length - 1; i >= 0; i--) g.lineTo(x(run[i].time), y(base[i]));
        g.closePath();
        g.fillStyle = c.owner(state.series[column].colour) || c.dim;
        g.globalAlpha = 0.88;
        g.fill();
        g.globalAlpha = 1;
        if (state.series[column].kind === "unattributed") {
          g.fillStyle = hatch(g, c);
          g.fill();
        }
      }
      base = tops;
    }
  }
  function hatch(g, c) {
    const tile = h("canvas", { width: 6, height: 6 }),
      t = tile.getContext("2d");
    t.strokeStyle = c.card;
    t.lineWidth = 1.4;
    t.beginPath();
    t.moveTo(-1, 7);
    t.lineTo(7, -1);
    t.stroke();
    return g.createPattern(tile, "repeat");
  }
  function level(g, c, { shown, box, x, y, most, scope }, column, colour, dash, word) {
    const last = shown.at(-1)?.values[column];
    if (last === undefined || last !== last) return;
    const label = `${ui.t(word)} ${formatBytes(last)}`;
    g.fillStyle = colour;
    g.textAlign = "right";
    if (last > most || scope === "model") {
      if (column === 1 || scope !== "model") g.fillText(`${label} ↑`, box.right - (column ? 0 : 150), box.top - 6);
      return;
    }
    g.strokeStyle = colour;
    g.lineWidth = 1.3;
    g.setLineDash(dash);
    g.beginPath();
    let seen = null;
    for (const sample of shown) {
      const v = sample.values[column];
      if (v !== v) {
        seen = null;
        continue;
      }
      g[seen !== null && sample.time - seen <= GAP ? "lineTo" : "moveTo"](x(sample.time), y(v));
      seen = sample.time;
    }
    g.stroke();
    g.setLineDash([]);
    g.fillText(label, box.right - 3, Math.max(box.top - 3, y(last) - 4));
  }
  // Events of one kind that stand close together share a mark; the newest get their labels first.
  function groups(start, end, x) {
    const list = [];
    for (const event of store.events) {
      if (event.time < start || event.time > end || event.kind === "policy" || event.kind === "note") continue;
      const last = list.at(-1),
        at = x(event.time);
      if (last && last.event.kind === event.kind && at - last.at < 12)
        Object.assign(last, { event, more: last.more + 1 });
      else list.push({ event, at, more: 0 });
    }
    return list.reverse();
  }
  function markers(g, c, { box, start, end, x }) {
    const taken = [Infinity, Infinity],
      labels = [],
      unlabelled = [];
    g.textAlign = "left";
    g.lineWidth = 1;
    for (const { event, at, more } of groups(start, end, x)) {
      const text = `${ICONS[event.kind] ?? "◦"} ${ui.t(`event ${event.kind}`)} ${event.subject}${more ? ` +${more}` : ""}`;
      const wide = g.measureText(text).width,
        left = Math.max(box.left, Math.min(at - 4, box.right - wide));
      g.strokeStyle = c.dim;
      g.globalAlpha = 0.5;
      g.beginPath();
      g.moveTo(Math.round(at) + 0.5, box.top);
      g.lineTo(Math.round(at) + 0.5, box.bottom + 3);
      g.stroke();
      g.globalAlpha = 1;
      const lane = taken.findIndex((edge) => left + wide + 10 < edge);
      g.fillStyle = event.kind === "out of memory" ? c.danger : c.ink;
      if (lane >= 0) {
        taken[lane] = left;
        if (!lane) labels.push([left - 6, left + wide + 6]);
        g.fillText(text, left, box.bottom + 29 + 14 * lane);
      } else unlabelled.push([event, at, g.fillStyle]);
    }
    // An icon alone goes where no label is in its way; the line stands in any case.
    for (const [event, at, colour] of unlabelled) {
      if (labels.some(([from, to]) => at + 4 > from && at - 4 < to)) continue;
      g.fillStyle = colour;
      g.fillText(ICONS[event.kind] ?? "◦", at - 4, box.bottom + 29);
    }
  }

  return { paint, value, byRank, show: (next) => (state = next) };
}
