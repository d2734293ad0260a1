// Drawings from the kernel, kept by the places of the controls, so that a control shows a drawing without the kernel. The
// drawings around the present one are fetched one by one, from when the reader comes to the picture.

const AROUND = 40; // places on each side of a control that are fetched
const SLOW_SECONDS = 0.5; // of the processor: what takes longer is drawn only when a control stands there
const RETRY_MS = 1000;
const SVG_STYLE = "<style>svg { display: block; width: 100%; height: auto }</style>";

const round = (place) => (typeof place === "number" ? Number(place.toFixed(6)) : place);
const keyOf = (places) => JSON.stringify(places.map(round));

// What a control offers: its place, and the places on either side of it, the nearest first.
function makePlace(control) {
  const name = control.get("index") === undefined ? "value" : "index", numbers = typeof control.get(name) === "number";
  const low = () => (name === "index" ? 0 : (control.get("min") ?? 0));
  const step = () => (name === "index" ? 1 : (control.get("step") ?? 1));
  const last = () => (name === "index" ? control.get("_options_labels").length - 1 : Math.round((control.get("max") - low()) / step()));
  const get = () => Math.round((control.get(name) - low()) / step());
  const at = (number) => round(low() + number * step());
  const around = () => {
    if (!numbers) return [!control.get(name)];
    const here = get();
    return Array.from({ length: 2 * AROUND }, (_, i) => here + (i % 2 ? -1 : 1) * (1 + (i >> 1))).filter((n) => n >= 0 && n <= last()).map(at);
  };
  const set = (number) => {
    control.set(name, at(number));
    control.save_changes();
  };
  return { control, name, label: control.get("description"), place: () => control.get(name), around, last, get, set };
}

async function render({ model, el }) {
  const host = document.createElement("div");
  host.className = "hsa-frame";
  host.setAttribute("role", "img");
  host.setAttribute("aria-label", model.get("alt"));
  const page = host.attachShadow({ mode: "open" }); // so that the ids of one drawing are not those of another
  const line = document.createElement("div");
  line.className = "hsa-line";
  line.setAttribute("role", "status");
  line.style.cssText = "padding: 4px 0; min-height: 1.5em";
  el.append(host, line);

  const kept = new Map();
  let cells = null, shown = null, flying = false, here = false, retry = null, places = [], last = 0, box = null, players = [];
  const key = () => keyOf(places.map(({ place }) => place()));
  const show = (frame) => {
    shown = keyOf(frame.places);
    page.innerHTML = SVG_STYLE + frame.svg;
    host.dataset.shown = shown;
    line.textContent = frame.line;
    for (const player of players) player.redraw();
  };
  // A drawing that comes from the kernel. After a cell has run, those from before may be wrong.
  const take = (frame) => {
    if (frame.cells !== cells) kept.clear();
    cells = frame.cells;
    kept.set(keyOf(frame.places), frame);
    host.dataset.kept = kept.size;
    if (!places.length || keyOf(frame.places) === key()) show(frame);
  };
  // The next drawing to fetch: the present one, along the control that has moved last, then along the others.
  const wanted = () => {
    const now = places.map(({ place }) => place());
    if (!kept.has(keyOf(now))) return now;
    for (let i = 0; i < places.length; i++) {
      const which = (last + i) % places.length;
      for (const place of places[which].around()) {
        const goal = now.with(which, place);
        if (!kept.has(keyOf(goal))) return goal;
      }
    }
    return null;
  };
  const ahead = () => {
    const goal = here && !flying ? wanted() : null;
    if (!goal) return;
    flying = true;
    model.send({ places: goal });
  };
  const answered = ({ frame, seconds, failed, busy }) => {
    flying = false;
    if (frame) take(frame);
    if (failed) kept.set(keyOf(failed), null);
    if (seconds > SLOW_SECONDS) here = false;
    if (busy) retry = setTimeout(ahead, RETRY_MS);
    else ahead();
  };
  const drawn = () => {
    take(model.get("frame"));
    ahead();
  };
  const moved = () => {
    const frame = kept.get(key());
    if (frame && key() !== shown) show(frame);
    for (const player of players) player.redraw();
    ahead();
  };
  const come = () => {
    if (here) return;
    here = true;
    ahead();
  };
  drawn();
  model.on("change:frame", drawn);
  model.on("msg:custom", answered);

  const found = (reference) => model.widget_manager.get_model(reference.replace("IPY_MODEL_", ""));
  places = (await Promise.all(model.get("controls").map(found))).map(makePlace);
  places.forEach(({ control, name }, number) => control.on(`change:${name}`, () => ((last = number), moved()), host));
  players = model.get("play").map((number) => {
    const { label, last: end, get, set } = places[number];
    const player = makePlayer({ name: label, last: end, get, set });
    host.after(player.root);
    player.redraw();
    return player;
  });
  const waiting = setInterval(() => {
    box = el.closest(".widget-vbox"); // null until this view is part of the page
    if (!box) return;
    clearInterval(waiting);
    for (const event of ["pointerover", "focusin"]) box.addEventListener(event, come);
  }, 50);
  return () => {
    clearInterval(waiting);
    clearTimeout(retry);
    for (const player of players) player.end();
    for (const event of ["pointerover", "focusin"]) box?.removeEventListener(event, come);
    for (const { control, name } of places) control.off(`change:${name}`, null, host);
    model.off("change:frame", drawn);
    model.off("msg:custom", answered);
  };
}

export default { render };
