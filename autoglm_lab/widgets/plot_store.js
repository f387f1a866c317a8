// What the live plot knows: a bounded ring of samples and of events, filled by messages, whatever views come and go.
// Samples arrive as binary messages (layout: series.py).

const MOST_SAMPLES = 6000,
  MOST_EVENTS = 400,
  FIXED = 2,
  GAP = 5;

function decode(view) {
  const samples = [],
    count = view.getUint32(0, true),
    columns = view.getUint32(4, true);
  for (let i = 0, at = 8; i < count; i++) {
    const values = new Float32Array(columns),
      time = view.getFloat64(at, true);
    at += 8;
    for (let c = 0; c < columns; c++, at += 4) values[c] = view.getFloat32(at, true);
    samples.push({ time, values });
  }
  return samples;
}

function same(a, b) {
  return (
    a.values.length === b.values.length &&
    a.values.every((v, i) => v === b.values[i] || (v !== v && b.values[i] !== b.values[i]))
  );
}

function openStore(model) {
  const store = { samples: [], events: [], window: 120, scope: null, paused: null, views: new Set() };
  const add = (samples) => {
    const all = store.samples;
    for (const sample of samples) {
      const n = all.length;
      if (n && sample.time <= all[n - 1].time) continue;
      // A flat stretch needs only its ends.
      if (n > 1 && same(all[n - 1], sample) && same(all[n - 2], sample) && sample.time - all[n - 2].time < GAP / 2)
        all[n - 1] = sample;
      else all.push(sample);
    }
    if (all.length > MOST_SAMPLES) all.splice(0, all.length - MOST_SAMPLES);
  };
  model.on("msg:custom", (message, buffers) => {
    if (message.kind === "history") {
      store.samples.length = 0;
      store.events.length = 0;
    }
    if (message.kind === "history" || message.kind === "samples") add(decode(buffers[0]));
    if (message.kind === "events") {
      store.events.push(...message.events);
      if (store.events.length > MOST_EVENTS) store.events.splice(0, store.events.length - MOST_EVENTS);
    }
    for (const view of store.views) view();
  });
  model.send({ do: "history" });
  return store;
}

// Round steps in the unit that people read.
function ticks(most) {
  const unit = most >= 2 ** 30 ? 2 ** 30 : most >= 2 ** 20 ? 2 ** 20 : 2 ** 10;
  const rough = most / unit / 4,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const name = unit === 2 ** 30 ? "GiB" : unit === 2 ** 20 ? "MiB" : "KiB";
  const list = [];
  for (let i = 0; i * step * unit <= most * 1.0001; i++)
    list.push([i * step * unit, String(Number((i * step).toPrecision(4)))]);
  return { list, name };
}
