// The chat: writing, attaching, sending. Files go to the kernel as binary buffers. How messages look: chat_messages.js.

export default panel({
  name: "chat_panel",
  store: () => ({ files: [], sample: null, draft: "", thinking: null, open: new Set() }),
  build(ui) {
    const desk = ui.shared,
      bubble = chatMessages(ui, desk.open);
    let state = {},
      listed = new Map(),
      stick = true;

    const chooser = h("select", {
      class: "algm-field",
      "aria-label": ui.t("conversation"),
      title: ui.t("conversation"),
      onchange: () => ui.send("conversation", { name: chooser.value }),
    });
    const fresh = button("＋", {
      title: ui.t("new conversation"),
      kind: "algm-icon",
      onClick: () => ui.send("conversation", { name: "" }),
    });
    const thinking = checkbox(ui.t("thinking"), {
      title: ui.t("thinking hint"),
      onChange: (on) => {
        desk.thinking = on;
        ui.send("generation", { setting: "thinking", value: on });
      },
    });
    const log = h("div", {
      class: "algm-log",
      role: "log",
      "aria-live": "polite",
      "aria-label": ui.t("title"),
      tabindex: 0,
      onscroll: () => {
        stick = log.scrollHeight - log.scrollTop - log.clientHeight < 24;
      },
    });
    const note = h("div", { class: "algm-dim algm-empty" });
    const samples = h("div", { class: "algm-samples" });
    const warned = h("span", {});
    const anyway = button(ui.t("send anyway"), {
      title: ui.t("send anyway hint"),
      onClick: () => (state.refused && !hasDraft() ? ui.send("again") : send(true)),
    });
    const warning = h("div", { class: "algm-warning", role: "status", hidden: true }, warned, anyway);
    const tray = h("div", { class: "algm-tray", hidden: true });
    const picker = (kind) =>
      h("input", {
        type: "file",
        accept: `${kind}/*`,
        multiple: true,
        hidden: true,
        "aria-hidden": "true",
        tabindex: -1,
        "data-kind": kind,
        onchange: (event) => {
          attach([...event.target.files]);
          event.target.value = "";
        },
      });
    const pickers = { image: picker("image"), audio: picker("audio") };
    const limit = formatBytes(ui.model.get("state")?.limit);
    const adders = Object.fromEntries(
      ["image", "audio"].map((kind) => [
        kind,
        button(`＋ ${ui.t(kind)}`, { title: ui.t(`attach ${kind}`, { limit }), onClick: () => pickers[kind].click() }),
      ]),
    );
    const box = h("textarea", {
      class: "algm-box",
      rows: 1,
      "aria-label": ui.t("ask"),
      placeholder: ui.t("ask"),
      value: desk.draft,
      oninput: () => {
        desk.draft = box.value;
        grow();
      },
      onkeydown: keys,
      onpaste: paste,
    });
    const go = button(ui.t("send"), {
      title: ui.t("send hint"),
      kind: "algm-primary algm-go",
      onClick: () => (running() ? ui.send("stop") : send()),
    });
    const settings = settingsOf();
    const node = h(
      "div",
      { class: "algm-chat" },
      h(
        "div",
        { class: "algm-line" },
        h("h4", {}, ui.t("title")),
        chooser,
        fresh,
        h("span", { class: "algm-space" }),
        thinking.node,
        settings.node,
      ),
      log,
      samples,
      tray,
      warning,
      h("div", { class: "algm-input" }, adders.image, adders.audio, pickers.image, pickers.audio, box, go),
    );

    // Not a refusal: the plan may be for more than this message.
    const hasDraft = () => Boolean(box.value.trim() || desk.files.length || desk.sample);
    function warn({ warning: told, refused, can_force: able }) {
      warning.hidden = !told && !refused;
      anyway.hidden = !able;
      if (refused && !told) warned.textContent = ui.t("was refused");
      if (!told) return;
      const { missing, phase, context, images, conversations } = told;
      const figures = { images, conversations, context: ui.t("tokens", { n: formatCount(context) }) };
      warned.textContent = ui.t("will not fit", {
        bytes: formatBytes(missing),
        phase: ui.t(`phase ${phase}`),
        ...figures,
      });
    }
    const running = () => Boolean(ui.model.get("running")?.id);
    function settingsOf() {
      const names = {
        max_new_tokens: { min: 1, step: 32 },
        temperature: { min: 0, max: 2, step: 0.1 },
        top_p: { min: 0.05, max: 1, step: 0.05 },
        repetition_penalty: { min: 0.1, step: 0.05 },
      };
      const fields = Object.fromEntries(
        Object.entries(names).map(([name, limits]) => [
          name,
          field({
            label: ui.t(name),
            type: "number",
            ...limits,
            onDone: (value) => ui.send("generation", { setting: name, value: Number(value) }),
          }),
        ]),
      );
      const node = h(
        "details",
        { class: "algm-settings" },
        h("summary", { title: ui.t("generation hint") }, ui.t("generation")),
        h(
          "div",
          { class: "algm-sheet" },
          Object.entries(fields).map(([name, one]) => h("label", {}, h("span", {}, ui.t(name)), one.node)),
        ),
      );
      return {
        node,
        set(values) {
          for (const [name, one] of Object.entries(fields)) one.set(values[name], ui.busy(name));
        },
      };
    }

    // files
    async function attach(files) {
      for (const file of files) {
        const kind = file.type.startsWith("image/") ? "image" : file.type.startsWith("audio/") ? "audio" : null;
        const taken = desk.files.reduce((sum, one) => sum + one.file.size, 0);
        if (!kind) {
          ui.complain(ui.t("not media", { name: file.name }));
          continue;
        }
        if (taken + file.size > state.limit) {
          const sizes = { bytes: formatBytes(file.size), limit: formatBytes(state.limit) };
          ui.complain(ui.t("too large", { name: file.name, ...sizes }));
          continue;
        }
        if (desk.files.length >= state.most_files) break;
        const one = { kind, file, url: kind === "image" ? URL.createObjectURL(file) : "" };
        desk.files.push(one);
        if (kind === "image") measure(one);
      }
      drawTray();
      box.focus();
    }
    // The kernel knows what a picture of that size takes of the prompt.
    function measure(one) {
      const picture = new Image();
      picture.onload = () => {
        one.size = { width: picture.naturalWidth, height: picture.naturalHeight };
        ui.send("measure", one.size);
        drawTray();
      };
      picture.src = one.url;
    }
    function weight(one) {
      const tokens = one.size && (state.image_tokens ?? {})[`${one.size.width}x${one.size.height}`];
      const bytes = formatBytes(one.file.size);
      return tokens ? `${bytes} · ${ui.t("image tokens", { n: formatCount(tokens) })}` : bytes;
    }
    function paste(event) {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length) {
        event.preventDefault();
        attach(files);
      }
    }
    function drop(event) {
      event.preventDefault();
      event.stopPropagation();
      node.classList.remove("is-over");
      attach([...(event.dataTransfer?.files ?? [])]);
    }
    for (const kind of ["dragenter", "dragover"])
      node.addEventListener(kind, (event) => {
        if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
        event.preventDefault();
        event.stopPropagation();
        node.classList.add("is-over");
      });
    node.addEventListener("dragleave", (event) => {
      if (!node.contains(event.relatedTarget)) node.classList.remove("is-over");
    });
    node.addEventListener("drop", drop);

    function chip(kind, name, size, url, remove) {
      return h(
        "span",
        { class: "algm-chip" },
        safe(url)
          ? h("img", { src: safe(url), alt: "" })
          : h("span", { "aria-hidden": "true" }, kind === "audio" ? "♪" : "▣"),
        h("span", { class: "algm-chip-name", title: name }, name),
        size ? h("span", { class: "algm-dim" }, size) : null,
        remove ? button("×", { title: ui.t("remove", { name }), kind: "algm-plain", onClick: remove }) : null,
      );
    }
    function drawTray() {
      const sample = (state.samples ?? []).find((one) => one.name === desk.sample);
      tray.hidden = !desk.files.length && !sample;
      tray.replaceChildren(
        ...(sample
          ? [
              chip(sample.kinds[0], sample.title[ui.t("lang")], "", sample.thumb, () => {
                desk.sample = null;
                drawTray();
              }),
            ]
          : []),
        ...desk.files.map((one) =>
          chip(one.kind, one.file.name, weight(one), one.url, () => {
            URL.revokeObjectURL(one.url);
            desk.files = desk.files.filter((other) => other !== one);
            drawTray();
          }),
        ),
      );
    }
    function drawSamples() {
      samples.hidden = !state.samples.length;
      samples.replaceChildren(
        h("span", { class: "algm-dim" }, ui.t("try")),
        ...state.samples.map((one) =>
          h(
            "button",
            {
              type: "button",
              class: "algm-sample",
              title: `${one.title[ui.t("lang")]}: ${one.prompt[ui.t("lang")]}`,
              "data-sample": one.name,
              onclick: () => {
                desk.sample = one.kinds.length ? one.name : null;
                desk.draft = box.value = one.prompt[ui.t("lang")];
                drawTray();
                grow();
                box.focus();
              },
            },
            safe(one.thumb) ? h("img", { src: safe(one.thumb), alt: "" }) : null,
            one.kinds.includes("audio") ? "♪ " : "",
            one.title[ui.t("lang")],
          ),
        ),
      );
    }

    // saying
    // Enter sends. JupyterLab swallows the line break of Shift+Enter, so it is made here.
    function keys(event) {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      if (event.shiftKey) {
        box.setRangeText("\n", box.selectionStart, box.selectionEnd, "end");
        desk.draft = box.value;
        grow();
      } else if (!running()) send();
    }
    function grow() {
      box.style.height = "auto";
      box.style.height = `${Math.min(box.scrollHeight + 2, 132)}px`;
    }
    async function send(force = false) {
      const text = box.value.trim(),
        files = desk.files,
        sample = desk.sample;
      if ((!text && !files.length && !sample) || go.disabled) return;
      go.disabled = true;
      try {
        const buffers = await Promise.all(files.map((one) => one.file.arrayBuffer()));
        ui.send(
          "send",
          {
            text,
            sample,
            thinking: desk.thinking,
            force,
            files: files.map((one) => ({ kind: one.kind, name: one.file.name })),
          },
          buffers,
        );
        for (const one of files) URL.revokeObjectURL(one.url);
        desk.files = [];
        desk.sample = null;
        desk.draft = box.value = "";
        stick = true;
        drawTray();
        grow();
      } catch (error) {
        ui.fail(error);
      }
      setTimeout(drawGo, 400);
    }
    function drawGo() {
      const busy = running();
      go.disabled = ui.busy("send");
      go.textContent = busy ? `■ ${ui.t("stop")}` : ui.t("send");
      go.title = busy ? ui.t("stop hint") : ui.t("send hint");
      go.setAttribute("aria-label", go.title);
      go.classList.toggle("is-stop", busy);
    }

    function drawLog() {
      const now = ui.model.get("running") ?? {};
      const messages = [...(ui.model.get("messages") ?? []), ...(now.id ? [now] : [])];
      const nodes = new Map();
      let shot = null;
      const children = messages.map((message) => {
        const picture = (message.attachments ?? []).filter((one) => one.kind === "image").at(-1);
        if (picture) shot = picture.thumb;
        const key = JSON.stringify(message);
        const old = listed.get(message.id);
        const made = old?.key === key ? old : { key, node: bubble(message, shot) };
        nodes.set(message.id, made);
        return made.node;
      });
      listed = nodes;
      const word = !children.length
        ? state.elsewhere
          ? "said elsewhere"
          : "nothing said"
        : state.forgotten && !now.id
          ? "forgotten"
          : null;
      if (word) {
        note.textContent = ui.t(word);
        children.push(note);
      }
      if (children.length !== log.children.length || children.some((child, i) => child !== log.children[i]))
        log.replaceChildren(...children);
      if (stick) log.scrollTop = log.scrollHeight;
      drawGo();
    }

    const redraw = () => {
      try {
        drawLog();
      } catch (error) {
        ui.fail(error);
      }
    };
    ui.model.on("change:messages", redraw);
    ui.model.on("change:running", redraw);
    let known = "",
      shownSamples = "";
    function update(next) {
      state = next;
      const names = JSON.stringify([next.conversations, next.conversation]);
      if (names !== known) {
        known = names;
        chooser.replaceChildren(...next.conversations.map((name) => h("option", { value: name }, name)));
        chooser.value = next.conversation;
      }
      if (JSON.stringify(next.samples) !== shownSamples) {
        shownSamples = JSON.stringify(next.samples);
        drawSamples();
      }
      for (const kind of ["image", "audio"]) adders[kind].hidden = !next.modalities.includes(kind);
      if (desk.thinking === null || !ui.busy("thinking")) desk.thinking = next.thinking;
      thinking.node.hidden = !next.can_think;
      thinking.set(desk.thinking);
      settings.set(next.generation);
      warn(next);
      drawTray();
      redraw();
    }
    requestAnimationFrame(grow);
    const size = new ResizeObserver(() => {
      if (stick) log.scrollTop = log.scrollHeight;
    });
    size.observe(log);
    return {
      node,
      update,
      gone() {
        size.disconnect();
        ui.model.off("change:messages", redraw);
        ui.model.off("change:running", redraw);
      },
    };
  },
});
