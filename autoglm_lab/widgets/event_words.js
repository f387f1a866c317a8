// How an event is said, in the plot and in the list.

const ICONS = {
  woke: "▲",
  parked: "▼",
  reclaimed: "●",
  "out of memory": "✕",
  evicted: "◆",
  dropped: "◆",
  budget: "▬",
};

function eventText(ui, event) {
  return [
    ui.t(`event ${event.kind}`),
    event.subject,
    event.seconds !== null ? formatSeconds(event.seconds) : "",
    event.nbytes ? formatBytes(event.nbytes) : "",
  ]
    .filter(Boolean)
    .join(" ");
}
