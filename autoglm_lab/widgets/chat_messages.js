// How a message of the chat looks. Everything that was said enters the page as text.

const mono = (text) => /^\s*(do|finish)\(/.test(text);

// Where a Tap answer points: coordinates 0 to 999 over the picture.
function tapOf(text) {
  const found = /^\s*do\(action="[^"]*",\s*element=\[(\d{1,3}),\s*(\d{1,3})\]/.exec(text);
  return found ? [Number(found[1]) / 9.99, Number(found[2]) / 9.99] : null;
}

// Only pictures that the kernel or this page made.
const safe = (url) => (/^(data:image\/png;base64,|blob:)/.test(url ?? "") ? url : "");

// `open` holds the ids of the messages whose thought is unfolded.
function chatMessages(ui, open) {
  function attachment(one) {
    if (one.kind === "image" && safe(one.thumb))
      return h(
        "figure",
        { class: "algm-shot" },
        h("img", { src: safe(one.thumb), alt: one.name }),
        h("figcaption", { class: "algm-dim", title: one.name }, `${one.name} · ${one.width}×${one.height}`),
      );
    const peaks = one.peaks ?? [];
    const wave = peaks.length
      ? h(
          "svg",
          { class: "algm-wave", viewBox: `0 0 ${peaks.length * 3} 24`, "aria-hidden": "true" },
          peaks.map((peak, i) =>
            h("rect", {
              x: i * 3,
              width: 2,
              y: 12 - Math.max(0.6, 11 * peak),
              height: Math.max(1.2, 22 * peak),
              rx: 1,
            }),
          ),
        )
      : null;
    return h(
      "span",
      { class: "algm-chip" },
      h("span", { "aria-hidden": "true" }, one.kind === "audio" ? "♪" : "▣"),
      wave,
      h("span", { class: "algm-chip-name", title: one.name }, one.name),
      h("span", { class: "algm-dim" }, one.seconds ? formatSeconds(one.seconds) : one.nbytes ? formatBytes(one.nbytes) : ""),
    );
  }
  function figureLine(f) {
    const parts = [];
    if (f.first_token !== null) parts.push(ui.t("first token", { time: formatSeconds(f.first_token) }));
    if (f.rate !== null) parts.push(`${Math.round(f.rate)} tok/s`);
    const tokens = [
      ["image_tokens", "n image"],
      ["audio_tokens", "n audio"],
      ["text_tokens", "n text"],
    ]
      .filter(([key]) => f[key] > 0)
      .map(([key, word]) => ui.t(word, { n: formatCount(f[key]) }))
      .join(" + ");
    parts.push(ui.t("tokens in", { tokens, cached: formatCount(f.cached_tokens) }));
    parts.push(ui.t("tokens out", { n: formatCount(f.new_tokens) }));
    if (f.peak !== null) parts.push(ui.t("peak", { bytes: formatBytes(f.peak) }));
    if (f.finish !== "stop") parts.push(ui.t(`finish ${f.finish}`));
    return parts.join(" · ");
  }
  // What each phase held beyond what stood when it began, and how far the process got in it.
  function phaseLine(phases) {
    const parts = phases.map((one) => {
      const phase = ui.t(`phase ${one.phase}`),
        work = formatBytes(one.work),
        peak = formatBytes(one.peak);
      return h(
        "span",
        { title: ui.t("took hint", { phase, work, peak }) },
        `${phase} +${work}`,
        h("span", { class: "algm-peak" }, ` → ${peak}`),
      );
    });
    return h("div", { class: "algm-phases" }, parts);
  }
  function thought(message) {
    if (!message.reasoning) return null;
    const title =
      message.thought_seconds === null || message.thought_seconds === undefined
        ? ui.t("thinking now")
        : ui.t("thought for", { time: formatSeconds(message.thought_seconds) });
    const details = h(
      "details",
      { class: "algm-thought", ontoggle: () => open[details.open ? "add" : "delete"](message.id) },
      h("summary", {}, title),
      h("div", {}, message.reasoning),
    );
    details.open = open.has(message.id);
    return details;
  }
  function bubble(message, shot) {
    if (message.role === "user")
      return h(
        "div",
        { class: "algm-message algm-me" },
        (message.attachments ?? []).map(attachment),
        message.text ? h("div", { class: "algm-said" }, message.text) : null,
      );
    const tap = !message.error && tapOf(message.text ?? "");
    const target =
      tap && shot
        ? h(
            "span",
            { class: "algm-target", title: ui.t("tap here") },
            h("img", { src: safe(shot), alt: "" }),
            h("i", { style: { left: `${tap[0]}%`, top: `${tap[1]}%` } }),
          )
        : null;
    return h(
      "div",
      {
        class: `algm-message algm-ai${message.error ? " is-error" : ""}`,
        "data-running": message.running ? "true" : null,
      },
      thought(message),
      message.error ? h("div", { role: "alert", class: "algm-said" }, `${ui.t("error")}: ${message.error}`) : null,
      message.text || message.running
        ? h(
            "div",
            { class: `algm-said${mono(message.text) ? " algm-mono" : ""}` },
            message.text || (message.reasoning ? "" : "…"),
          )
        : null,
      !message.text && !message.running && !message.error ? h("div", { class: "algm-dim" }, ui.t("no text")) : null,
      target,
      message.events?.length ? h("div", { class: "algm-figures" }, message.events.join(" · ")) : null,
      message.figures ? h("div", { class: "algm-figures" }, figureLine(message.figures)) : null,
      message.figures?.phases?.length ? phaseLine(message.figures.phases) : null,
    );
  }

  return bubble;
}
