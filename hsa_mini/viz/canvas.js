// What canvases with one slider share. A widget's script is this one with its own behind it.

// The colours of JupyterLab's theme; those after || are for pages without one.
function theme(canvas) {
  const style = getComputedStyle(canvas);
  const value = (name) => style.getPropertyValue(name).trim();
  return {
    dark: document.body.dataset.jpThemeLight === "false",
    paper: value("--jp-layout-color0") || "#FFFFFF",
    ink: value("--jp-content-font-color1") || "#222222",
    pale: value("--jp-layout-color2") || "#EDEDED",
  };
}

function typed(view, Kind) {
  return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// A canvas that is a slider for screen readers. style: more CSS.
function sliderCanvas(model, style = "") {
  const canvas = document.createElement("canvas");
  canvas.style.cssText = `width: 100%; max-width: 1150px; display: block; cursor: crosshair; ${style}`;
  for (const [name, value] of Object.entries({
    tabindex: "0", role: "slider", "aria-label": model.get("alt"), "aria-valuemin": "0", "data-lm-suppress-shortcuts": "true",
  })) canvas.setAttribute(name, value);
  return canvas;
}

// The canvas at this width and height, ready to be drawn: its pen, and the colours of the theme on whose paper it draws.
function cleared(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1, look = theme(canvas), pen = canvas.getContext("2d");
  canvas.style.height = `${height}px`;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  pen.scale(ratio, ratio);
  pen.fillStyle = look.paper;
  pen.fillRect(0, 0, width, height);
  return { pen, look };
}

// A line of text beside the pointer: at(x, y) is what stands there, or nothing. On focus by keyboard it says focused().
function tooltips(canvas, at, focused) {
  const tip = document.createElement("div");
  tip.setAttribute("role", "tooltip");
  tip.style.cssText = `position: fixed; z-index: 1000; pointer-events: none; max-width: 320px; padding: 3px 7px; font-size: 13px;
    border: 1px solid var(--jp-border-color1, #bbb); background: var(--jp-layout-color1, #fff); color: var(--jp-ui-font-color1, #222)`;
  const hide = () => (tip.hidden = true);
  const show = (text, x, y) => {
    tip.hidden = !text;
    tip.textContent = text ?? "";
    tip.style.left = `${Math.max(Math.min(x + 12, innerWidth - tip.offsetWidth - 4), 0)}px`;
    tip.style.top = `${Math.min(y + 14, innerHeight - tip.offsetHeight - 4)}px`;
  };
  hide();
  document.body.append(tip);
  canvas.addEventListener("pointermove", ({ clientX, clientY }) => {
    const { left, top } = canvas.getBoundingClientRect();
    show(at(clientX - left, clientY - top), clientX, clientY);
  });
  canvas.addEventListener("focus", () => {
    const { left, bottom } = canvas.getBoundingClientRect();
    if (canvas.matches(":focus-visible")) show(focused(), left, bottom - 14);
  });
  for (const event of ["pointerleave", "blur", "keydown"]) canvas.addEventListener(event, hide);
  return { end: () => tip.remove() };
}

// Keys move the model's value `name` between 0 and last(), page keys to page(value, 1 or -1); Escape leaves. load() runs for
// new data, and redraw(width) for new data, another value of `name` or of the values `also`, width or theme. keys: what else
// keys do. Returns move(goal), and end() for when the view goes.
function live({ model, canvas, name, last, page, load, redraw, also = [], keys = {} }) {
  let width = 320;
  const draw = () => redraw(width);
  const reload = () => {
    load();
    draw();
  };
  const move = (goal) => {
    model.set(name, Math.min(Math.max(goal, 0), last()));
    model.save_changes();
  };
  canvas.addEventListener("keydown", (event) => {
    const value = model.get(name);
    const act = event.key === "Escape" ? () => canvas.blur() : keys[event.key];
    const goal = act ? null : {
      ArrowLeft: value - 1, ArrowDown: value - 1, PageDown: page(value, -1), Home: 0,
      ArrowRight: value + 1, ArrowUp: value + 1, PageUp: page(value, 1), End: last(),
    }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    act ? act() : move(goal);
  });
  const changes = [name, ...also].map((one) => `change:${one}`);
  for (const change of changes) model.on(change, draw);
  model.on("change:data", reload);
  // The width is not read while the theme changes, because the page has no layout for a moment.
  const resized = new ResizeObserver(([{ contentRect }]) => {
    width = Math.max(contentRect.width, 320);
    draw();
  });
  const themed = new MutationObserver(() => requestAnimationFrame(draw));
  reload();
  resized.observe(canvas);
  themed.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  const end = () => {
    resized.disconnect();
    themed.disconnect();
    for (const change of changes) model.off(change, draw);
    model.off("change:data", reload);
  };
  return { move, end };
}

