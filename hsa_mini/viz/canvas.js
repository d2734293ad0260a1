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

// Keys move the model's value `name` between 0 and last(), page keys to page(value, 1 or -1). load() runs for new data,
// and redraw(width) for new data, another value, width or theme. Returns move(goal), and end() for when the view goes.
function live({ model, canvas, name, last, page, load, redraw }) {
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
    const goal = {
      ArrowLeft: value - 1, ArrowDown: value - 1, PageDown: page(value, -1), Home: 0,
      ArrowRight: value + 1, ArrowUp: value + 1, PageUp: page(value, 1), End: last(),
    }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    move(goal);
  });
  model.on(`change:${name}`, draw);
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
    model.off(`change:${name}`, draw);
    model.off("change:data", reload);
  };
  return { move, end };
}

