// Play, pause, step and speed: one bar for everything that happens in time.

const SPEEDS = [0.5, 1, 2, 4, 8];

// name: of one step ("answer token"). Steps are numbered 0 to last(); get() is the present one, set(step) goes to another.
// seconds: of one step at speed 1. toggle() and step(way) are for keys; redraw() after whatever else moved; end() stops, also
// when the view goes.
function makePlayer({ name, last, get, set, seconds = 0.5 }) {
  const bar = document.createElement("div");
  bar.className = "hsa-player";
  bar.style.cssText = "display: flex; flex-wrap: wrap; gap: 6px; align-items: center; padding: 4px 0; font-size: 13px";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", `Play: ${name}`);
  bar.dataset.lmSuppressShortcuts = "true"; // or JupyterLab takes the keys
  const button = (text, label, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.style.cssText = "min-width: 2.6em; min-height: 28px; font: inherit; cursor: pointer";
    made.setAttribute("aria-label", label);
    made.title = label;
    made.addEventListener("click", act);
    bar.append(made);
    return made;
  };
  let timer = null;
  const end = () => {
    clearInterval(timer);
    timer = null;
  };
  const pause = () => {
    end();
    redraw();
  };
  const step = (way) => {
    pause();
    set(Math.min(Math.max(get() + way, 0), last()));
  };
  const play = () => {
    if (get() >= last()) set(0);
    timer = setInterval(() => {
      if (get() < last()) set(get() + 1);
      if (get() >= last()) pause();
    }, (1000 * seconds) / Number(speed.value));
    redraw();
  };
  const toggle = () => (timer === null ? play() : pause());
  button("◂", `Back one ${name}`, () => step(-1));
  const toggled = button("▶", "Play", toggle);
  button("▸", `On one ${name}`, () => step(1));
  const range = document.createElement("input");
  Object.assign(range, { type: "range", min: 0, step: 1 });
  range.style.cssText = "flex: 1 1 120px; max-width: 420px";
  range.setAttribute("aria-label", name);
  range.addEventListener("input", () => {
    const goal = Number(range.value); // pausing redraws the range
    pause();
    set(goal);
  });
  const place = document.createElement("span");
  place.style.cssText = "min-width: 5em; font-variant-numeric: tabular-nums";
  const speed = document.createElement("select");
  speed.setAttribute("aria-label", "Speed");
  speed.style.cssText = "font: inherit; min-height: 28px";
  speed.append(...SPEEDS.map((factor) => new Option(`${factor}×`, factor, factor === 1, factor === 1)));
  speed.addEventListener("change", () => {
    if (timer === null) return;
    pause();
    play();
  });
  bar.append(range, place, speed);
  bar.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    pause();
    document.activeElement.blur();
  });
  const redraw = () => {
    const playing = timer !== null;
    toggled.textContent = playing ? "❚❚" : "▶";
    for (const attribute of ["aria-label", "title"]) toggled.setAttribute(attribute, playing ? "Pause" : "Play");
    range.max = last();
    range.value = get();
    place.textContent = `${get()} of ${last()}`;
    range.setAttribute("aria-valuetext", `${name} ${place.textContent}`);
  };
  return { root: bar, toggle, step, redraw, end, playing: () => timer !== null };
}
