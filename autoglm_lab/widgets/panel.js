// Shared by every panel (it stands before the panel's own file): elements, words, sizes, controls and the life cycle.
// Text from outside only ever enters the page as text nodes or through checked data: URLs.

function h(tag, props = {}, ...children) {
  const svg = ["svg", "path", "polygon", "line", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else if (name === "value" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...solid(children));
  return node;
}
const solid = (children) =>
  children.flat(3).filter((child) => child !== null && child !== undefined && child !== false);

function formatBytes(nbytes) {
  if (nbytes === null || nbytes === undefined || Number.isNaN(nbytes)) return "n/a";
  const size = Math.abs(nbytes),
    sign = nbytes < 0 ? "-" : "";
  if (size >= 2 ** 30) return `${sign}${(size / 2 ** 30).toFixed(2)} GiB`;
  if (size >= 2 ** 20) return `${sign}${(size / 2 ** 20).toFixed(1)} MiB`;
  if (size >= 2 ** 10) return `${sign}${(size / 2 ** 10).toFixed(1)} KiB`;
  return `${sign}${Math.round(size)} B`;
}

function formatSeconds(seconds) {
  if (seconds < 0.01) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

const formatCount = (n) => Math.round(n).toLocaleString("en");
const swatch = (colour) => h("span", { class: "algm-swatch", "data-colour": colour, "aria-hidden": "true" });

function button(label, { title, kind = "", onClick, pressed } = {}) {
  return h(
    "button",
    {
      type: "button",
      class: `algm-button ${kind}`,
      title: title ?? label,
      "aria-label": title ?? label,
      "aria-pressed": pressed,
      onclick: onClick,
    },
    label,
  );
}

// One of several: real radio buttons, so arrow keys, focus and screen readers work by themselves.
let groups = 0;
// What a person has turned stays as they turned it until the kernel has followed, or has had the time to: what it shows
// meanwhile is older than their click.
const PATIENCE = 1500;

function patient(read, write) {
  let waiting = null,
    latest;
  const settle = () => {
    clearTimeout(waiting);
    waiting = null;
  };
  return {
    turned: () => {
      settle();
      waiting = setTimeout(() => {
        settle();
        if (latest !== undefined) write(latest);
      }, PATIENCE);
    },
    show: (value) => {
      latest = value;
      if (read() === value) settle();
      if (waiting === null) write(value);
    },
  };
}

function segmented({ label, options, onPick }) {
  const group = `algm-${Date.now().toString(36)}-${++groups}`;
  const inputs = new Map();
  const items = options.map(([value, text, title]) => {
    const input = h("input", {
      type: "radio",
      name: group,
      "aria-label": `${label}: ${title ?? text}`,
      onchange: () => {
        choice.turned();
        onPick(value);
      },
    });
    inputs.set(value, input);
    return h("label", { title: title ?? text, "data-value": String(value) }, input, h("span", {}, text));
  });
  const node = h("span", { class: "algm-segmented", role: "radiogroup", "aria-label": label }, items);
  const choice = patient(
    () => [...inputs].find(([, input]) => input.checked)?.[0],
    (value) => inputs.forEach((input, key) => (input.checked = key === value)),
  );
  const set = (value, disabled = false) => {
    choice.show(value);
    for (const input of inputs.values()) input.disabled = disabled;
    node.classList.toggle("is-busy", disabled);
  };
  // One choice that is not to be had here, and why.
  const disable = (value, off, why) => {
    const input = inputs.get(value),
      [, text, title] = options.find(([key]) => key === value);
    if (off) input.disabled = true;
    input.parentNode.classList.toggle("is-off", off);
    input.parentNode.title = off ? why : (title ?? text);
  };
  return { node, set, disable };
}

// What is turned less often; whether it is unfolded lives as long as the widget.
function fold(ui, label, rows) {
  const node = h(
    "details",
    { class: "algm-more", ontoggle: () => (ui.shared.more = node.open) },
    h("summary", {}, label),
    rows,
  );
  node.open = Boolean(ui.shared.more);
  return node;
}

function checkbox(label, { title, onChange }) {
  const input = h("input", {
    type: "checkbox",
    "aria-label": title ?? label,
    onchange: () => {
      tick.turned();
      onChange(input.checked);
    },
  });
  const tick = patient(
    () => input.checked,
    (on) => (input.checked = on),
  );
  const node = h("label", { class: "algm-check", title: title ?? label }, input, h("span", {}, label));
  return {
    node,
    input,
    set: (on, disabled = false) => {
      tick.show(on);
      input.disabled = disabled;
    },
  };
}

// A number or a size that is sent when the person is done with it (Enter, or leaving the field), and never overwritten
// under their fingers.
function field({ label, title, type = "text", onDone, ...attributes }) {
  const input = h("input", { type, class: "algm-field", "aria-label": label, title: title ?? label, ...attributes });
  let shown = "";
  const done = () => {
    if (input.value !== shown) {
      shown = input.value;
      onDone(input.value);
    }
  };
  input.addEventListener("change", done);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") done();
  });
  const set = (value, disabled = false) => {
    shown = String(value ?? "");
    if (document.activeElement !== input && input.getRootNode().activeElement !== input) input.value = shown;
    input.disabled = disabled;
  };
  return { node: input, set };
}

function row(label, ...children) {
  return h("div", { class: "algm-row" }, h("span", { class: "algm-label" }, label), ...children);
}

// panel({name, build(ui) -> {node, update(state)}, store?(model), frame?: false}): the module's default export.
function panel({ name, build, store, bare = false }) {
  return () => {
    let shared; // lives as long as the widget, whatever views come and go
    return {
      initialize({ model }) {
        shared = store?.(model);
      },
      render({ model, el, signal }) {
        const words = () => model.get("labels") ?? {};
        const ui = {
          model,
          signal,
          shared,
          t: (key, values = {}) =>
            Object.entries(values).reduce((text, [k, value]) => text.replaceAll(`{${k}}`, value), words()[key] ?? key),
          // Rows of the ledger that are no one's own have a word in every language; modules and conversations keep their names.
          owner: (row) => words()[`kind ${row.kind}`] ?? row.name,
          send: (what, args = {}, buffers = undefined) => model.send({ do: what, ...args }, undefined, buffers),
          busy: (key) => (model.get("busy") ?? []).includes(key),
          complain: (text) => show(text),
          fail: (error) => show(`${ui.t("browser error")}: ${error?.message ?? error}`),
        };
        const problem = h("div", { class: "algm-problem", role: "alert", hidden: true });
        const root = h(bare ? "div" : "section", {
          class: `algm algm-${name}${bare ? "" : " algm-card"}`,
          "data-lm-suppress-shortcuts": "true",
        });
        const away = h("div", { class: "algm-away", role: "note", hidden: true });
        let body = null;

        function show(text) {
          problem.hidden = !text;
          if (!text) return;
          problem.replaceChildren(
            h("span", {}, text),
            button("×", {
              title: ui.t("dismiss"),
              kind: "algm-plain",
              onClick: () => {
                show("");
                ui.send("dismiss");
              },
            }),
          );
        }
        // A server that does not tell of its memory: said so, beside what its metrics do tell.
        function showAbsent({ absent, facts }) {
          const told = [["absent", { server: absent }], ...facts];
          const lines = told.map(([label, values]) => h("div", { class: "algm-dim" }, ui.t(label, values)));
          away.replaceChildren(h("h4", {}, ui.t("title")), ...lines);
        }
        function guarded(action) {
          try {
            return action();
          } catch (error) {
            console.error(error);
            ui.fail(error);
            return undefined;
          }
        }
        function draw() {
          guarded(() => {
            body?.gone?.();
            root.setAttribute("aria-label", ui.t("title"));
            body = build(ui);
            root.replaceChildren(body.node, away, problem);
          });
          refresh();
        }
        function refresh() {
          const state = model.get("state");
          if (!body || !state || !Object.keys(state).length) return;
          el.style.display = state.hidden ? "none" : ""; // a panel that this workbench has no use for
          body.node.hidden = Boolean(state.absent);
          away.hidden = !state.absent;
          if (state.absent) showAbsent(state);
          else guarded(() => body.update(state));
        }
        const showProblem = () => show(model.get("problem"));
        const handlers = [
          ["change:labels", draw],
          ["change:state", refresh],
          ["change:busy", refresh],
          ["change:problem", showProblem],
        ];
        for (const [event, handler] of handlers) model.on(event, handler);
        const caught = (event) => {
          if (root.contains(event.target)) ui.fail(event.error ?? event.message);
        };
        root.addEventListener("error", caught);
        el.replaceChildren(root);
        draw();
        showProblem();
        return () => {
          for (const [event, handler] of handlers) model.off(event, handler);
          body?.gone?.();
        };
      },
    };
  };
}
