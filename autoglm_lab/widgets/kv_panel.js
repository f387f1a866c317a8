// The limit of the KV cache, what happens there, how exactly keys and values are kept, and the conversations; what is
// turned less often is folded under "more".

export default panel({
  name: "kv_panel",
  store: () => ({ more: false }),
  build(ui) {
    let state = null,
      dragging = false;
    const set = (setting) => (value) => ui.send("set", { setting, value });
    const slider = h("input", {
      type: "range",
      min: 0,
      step: 1,
      class: "algm-slider",
      "aria-label": ui.t("limit"),
      title: ui.t("limit hint"),
      oninput: () => {
        dragging = true;
        tell(at(slider.value), at(slider.value));
      },
      onchange: () => {
        dragging = false;
        set("max_tokens")(at(slider.value));
      },
    });
    const figure = h("output", { class: "algm-num" });
    const choice = (setting, values) =>
      segmented({
        label: ui.t(setting),
        onPick: set(setting),
        options: values.map((value) => [value, ui.t(`${setting} ${value}`), ui.t(`${setting} ${value} hint`)]),
      });
    const full = choice("overflow", ["drop-oldest-turns", "stop", "window", "evict", "refuse"]);
    const precision = choice("precision", ["model", "int8", "int4"]);
    const place = choice("place", ["device", "host"]);
    const count = (setting, least) =>
      field({
        label: ui.t(`${setting} hint`),
        class: `algm-field algm-${setting}`,
        type: "number",
        min: least,
        step: 1,
        onDone: (value) => set(setting)(Number(value)),
      });
    const size = (setting, empty) =>
      field({
        label: ui.t(`${setting} hint`),
        size: 7,
        placeholder: ui.t(empty === null ? "no limit" : "none"),
        spellcheck: "false",
        onDone: (value) => set(setting)(value.trim() || empty),
      });
    const sinks = count("sinks", 0),
      firstOnes = count("sinks", 0),
      observation = count("observation", 1),
      most = count("max_conversations", 1),
      chunk = count("chunk", 16);
    const sizes = {
      max_bytes: size("max_bytes", null),
      prefix_bytes: size("prefix_bytes", 0),
      prefix_host_bytes: size("prefix_host_bytes", 0),
      encoder_bytes: size("encoder_bytes", 0),
    };
    const reuse = checkbox(ui.t("reuse"), { title: ui.t("reuse hint"), onChange: set("reuse") });
    const graphs = checkbox(ui.t("graphs"), { title: ui.t("graphs hint"), onChange: set("graphs") });
    const lossy = () => h("span", { class: "algm-lossy", title: ui.t("lossy hint") }, ui.t("lossy"));
    const words = (...parts) => h("span", { class: "algm-flow algm-dim" }, ...parts);
    const reason = h("span", { class: "algm-dim algm-small" });
    const share = h("span", { class: "algm-dim algm-num" });
    const inexact = lossy();
    // What it cost when it was measured, beside the switch that takes it.
    const measured = { class: "algm-dim algm-small", title: ui.t("measured hint") };
    const cost = h("span", { ...measured, "data-cost": "precision" });
    const cut = h("span", { ...measured, "data-cost": "window" }, ui.t("cost window"));
    const dropped = row("", h("span", { ...measured, "data-cost": "turns" }, ui.t("cost drop-oldest-turns")));
    const kept = h("span", { class: "algm-dim algm-num" }),
      keptHost = h("span", { class: "algm-dim algm-num" }),
      keptMedia = h("span", { class: "algm-dim algm-num" });
    const sliding = row("", words(ui.t("first"), sinks.node, ui.t("and latest"), lossy(), cut));
    const weighed = h("span", { class: "algm-dim algm-small", "data-cost": "evict" }, ui.t("cost evict"));
    const evicting = row(
      "",
      words(
        ui.t("first"),
        firstOnes.node,
        ui.t("and observed"),
        observation.node,
        ui.t("and attended"),
        lossy(),
        weighed,
      ),
    );
    const onHost = row("", words(sizes.prefix_host_bytes.node, ui.t("on host"), keptHost));
    const detail = field({
      label: ui.t("max_image_tokens hint"),
      class: "algm-field algm-max_image_tokens",
      type: "number",
      min: 16,
      step: 1,
      placeholder: ui.t("no limit"),
      onDone: (value) => ui.send("image_tokens", { value: value ? Number(value) : null }),
    });
    const pictures = row(ui.t("images"), words(detail.node, ui.t("tokens at most"), lossy()));
    const more = fold(ui, ui.t("more"), [
      row(ui.t("bytes"), words(sizes.max_bytes.node, ui.t("a conversation"))),
      row(ui.t("place"), h("span", { class: "algm-flow" }, place.node, reason)),
      row(ui.t("prefixes"), words(sizes.prefix_bytes.node, ui.t("on device"), kept)),
      onHost,
      row(ui.t("encoders"), words(sizes.encoder_bytes.node, ui.t("of outputs"), keptMedia)),
      pictures,
      row(ui.t("prefill"), words(chunk.node, ui.t("tokens a step"))),
      row(ui.t("decode"), graphs.node),
    ]);
    const list = h("div", { class: "algm-conversations" });
    const node = h(
      "div",
      {},
      h("h4", {}, ui.t("title")),
      h("div", { class: "algm-row" }, h("span", { class: "algm-label" }, ui.t("limit")), slider, figure),
      row(ui.t("when full"), full.node),
      sliding,
      dropped,
      evicting,
      row(ui.t("precision"), h("span", { class: "algm-flow" }, precision.node, share, inexact, cost)),
      h(
        "div",
        { class: "algm-row" },
        h("span", { class: "algm-label" }, ui.t("between turns")),
        reuse.node,
        h("span", { class: "algm-space" }),
        h("span", { class: "algm-pair algm-dim" }, ui.t("at most"), most.node),
      ),
      list,
      more,
    );

    const at = (index) => state.steps[Number(index)] ?? null;
    const bytesOf = (tokens) => state.token_bytes[state.precision] * tokens;
    function tell(chosen, limit) {
      const tokens = limit ?? state.context;
      const parts = [limit === null ? ui.t("no limit") : ui.t("tokens", { n: formatCount(limit) })];
      if (bytesOf(1) && tokens) parts.push(formatBytes(bytesOf(tokens)));
      slider.style.setProperty("--algm-fill", `${(100 * slider.value) / Math.max(1, slider.max)}%`);
      figure.textContent = parts.join(" · ");
      figure.title = limit !== chosen ? ui.t("by bytes", { size: state.max_bytes }) : "";
      slider.setAttribute("aria-valuetext", figure.textContent);
    }
    function conversation(one) {
      const busy = ui.busy(`drop ${one.name}`);
      const reused = one.reused_share === null ? "" : ui.t("reused", { share: Math.round(100 * one.reused_share) });
      return h(
        "div",
        { class: "algm-conversation", "data-conversation": one.name },
        h("span", { class: "algm-name", title: one.name }, one.name),
        h(
          "span",
          { class: "algm-dim algm-num" },
          `${ui.t("tokens", { n: formatCount(one.tokens) })} · ${formatBytes(one.kv_bytes)}`,
        ),
        h("span", { class: "algm-dim algm-num" }, one.busy ? ui.t("busy") : reused),
        button(ui.t("drop"), {
          title: ui.t("drop hint", { name: one.name }),
          kind: busy || one.busy ? "is-busy" : "",
          onClick: (event) => {
            event.target.disabled = true;
            ui.send("drop", { conversation: one.name });
          },
        }),
      );
    }
    let listed = "";
    function update(next) {
      state = next;
      const off = (setting) => ui.busy(setting) || !state.control;
      const index =
        state.max_tokens === null ? state.steps.length : state.steps.findIndex((step) => step >= state.max_tokens);
      slider.max = state.steps.length;
      slider.disabled = off("max_tokens");
      if (!dragging) {
        slider.value = index < 0 ? state.steps.length : index;
        tell(state.max_tokens, state.limit);
      }
      full.set(state.overflow, off("overflow"));
      for (const choice of ["window", "evict"]) full.disable(choice, !state.paged, ui.t("not paged"));
      sliding.hidden = state.overflow !== "window";
      dropped.hidden = state.overflow !== "drop-oldest-turns" || state.max_tokens === null;
      evicting.hidden = state.overflow !== "evict";
      sinks.set(state.sinks, off("sinks"));
      firstOnes.set(state.sinks, off("sinks"));
      observation.set(state.observation, off("observation"));
      precision.set(state.precision, off("precision") || !state.paged);
      share.textContent = bytesOf(1) ? ui.t("a token", { bytes: formatBytes(bytesOf(1)) }) : "";
      const whole = state.token_bytes.model;
      share.title = whole ? ui.t("share", { share: Math.round((100 * bytesOf(1)) / whole) }) : "";
      cost.hidden = inexact.hidden = state.precision === "model";
      cost.textContent = cost.hidden ? "" : ui.t(`cost ${state.precision}`);
      reuse.set(state.reuse, off("reuse"));
      most.set(state.max_conversations, off("max_conversations"));
      const where = !state.gpu ? "no gpu" : !state.paged ? "not paged" : state.place === "host" ? "slower" : null;
      place.set(state.place, off("place") || !state.gpu || !state.paged);
      reason.textContent = where ? ui.t(where) : "";
      for (const [setting, one] of Object.entries(sizes)) one.set(state[setting] ?? "", off(setting));
      onHost.hidden = !state.gpu;
      kept.textContent = now(state.prefixes_now);
      keptHost.textContent = now(state.prefixes_host_now);
      keptMedia.textContent = now(state.encoders_now);
      detail.set(state.max_image_tokens ?? "", off("max_image_tokens"));
      pictures.hidden = !state.images;
      chunk.set(state.chunk, off("chunk"));
      graphs.set(state.graphs && state.gpu, off("graphs") || !state.gpu || !state.paged);
      graphs.node.title = state.gpu ? ui.t("graphs hint") : ui.t("no gpu graphs");
      const key = JSON.stringify([state.conversations, ui.model.get("busy")]);
      if (key !== listed) {
        listed = key;
        list.replaceChildren(
          ...(state.conversations.length
            ? state.conversations.map(conversation)
            : [h("div", { class: "algm-dim algm-empty" }, ui.t("no conversations"))]),
        );
        for (const one of list.querySelectorAll("button.is-busy")) one.disabled = true;
      }
    }
    const now = (nbytes) => (nbytes ? `· ${ui.t("held now", { bytes: formatBytes(nbytes) })}` : "");
    return { node, update };
  },
});
