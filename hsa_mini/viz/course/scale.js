// Training on many GPUs: three panels over the number of GPUs, and a mark that mouse and arrow keys move.
// The numbers come from Python once for every context and batch.

const COLORS = ["#0072B2", "#56B4E9", "#8A8A8A", "#E69F00", "#009E73", "#CC79A7"];
const CURVES = [["#E69F00", [2, 3]], ["#009E73", [8, 3, 2, 3]], ["#D55E00", [6, 4]]];
const HIGH = 200, TOP = 26, BOTTOM = 40, LEFT = 44, RIGHT = 12, LEGEND = 17, GB = 1e9, NARROW = 760;
const DECADES = [-3, 4]; // of the logarithmic axis, in GB

// Every panel has: title, legend, labels of its axis [value 0..1, text], and draw(pen, box, at).
function panels(data, look) {
  const { gpus, memory, received, efficiency, capacity } = data, most = 2 * capacity;
  const blue = look.dark ? COLORS[1] : COLORS[0], curves = [[blue, []], ...CURVES];
  const log = (size) => (Math.log10(size / GB) - DECADES[0]) / (DECADES[1] - DECADES[0]);
  return [
    {
      title: "memory of a GPU, GB",
      legend: Object.keys(memory).map((name, i) => [name, COLORS[i], []]),
      labels: [0, 40, 80, 120, 160].map((size) => [(size * GB) / most, size]),
      draw: (pen, box, at) => {
        const wide = (0.8 * box.w) / gpus.length;
        gpus.forEach((_, i) => {
          let low = 0;
          Object.values(memory).forEach((sizes, part) => {
            const high = Math.min(low + sizes[i] / most, 1);
            pen.fillStyle = COLORS[part];
            pen.fillRect(at(i) - wide / 2, box.y + (1 - high) * box.h, wide, (high - low) * box.h);
            low = high;
          });
        });
        curve(pen, box, "#D55E00", [6, 4], [box.x, box.x + box.w], () => data.usable / most, (x) => x);
      },
    },
    {
      title: "received by a GPU in a step, GB",
      legend: Object.entries(received).filter(([, sizes]) => sizes.some(Boolean)).map(([name]) =>
        [name, ...curves[Object.keys(received).indexOf(name)]]),
      labels: [-3, -2, -1, 0, 1, 2, 3, 4].map((power) => [log(10 ** power * GB), power < 0 ? (10 ** power).toFixed(-power) : 10 ** power]),
      draw: (pen, box, at) => Object.values(received).forEach((sizes, i) => {
        // Where nothing travels, the line has a gap.
        const some = gpus.map((_, place) => place).filter((place) => sizes[place]);
        curve(pen, box, ...curves[i], some, (place) => log(sizes[place]), at, true, (place) => sizes[place - 1]);
      }),
    },
    {
      title: "efficiency against one GPU",
      legend: Object.keys(efficiency).map((name, i) => [name, blue, i ? [2, 3] : []]),
      labels: [0, 0.25, 0.5, 0.75, 1].map((share) => [share / 1.05, `${100 * share}%`]),
      draw: (pen, box, at) => Object.values(efficiency).forEach((shares, i) =>
        curve(pen, box, blue, i ? [2, 3] : [], gpus.map((_, place) => place), (place) => shares[place] / 1.05, at, true)),
    },
  ];
}

function curve(pen, box, color, dash, places, height, at, dots = false, joined = () => true) {
  const y = (place) => box.y + (1 - height(place)) * box.h;
  pen.strokeStyle = pen.fillStyle = color;
  pen.lineWidth = 2;
  pen.setLineDash(dash);
  pen.beginPath();
  for (const place of places) joined(place) ? pen.lineTo(at(place), y(place)) : pen.moveTo(at(place), y(place));
  pen.stroke();
  pen.setLineDash([]);
  if (dots) for (const place of places) pen.fillRect(at(place) - 3, y(place) - 3, 6, 6);
}

function drawPanel(pen, look, box, data, panel, place) {
  const at = (i) => box.x + ((i + 0.5) / data.gpus.length) * box.w;
  pen.fillStyle = look.pale;
  pen.fillRect(at(place) - (0.5 * box.w) / data.gpus.length, box.y, box.w / data.gpus.length, box.h);
  pen.fillStyle = look.ink;
  pen.font = "13px sans-serif";
  pen.textAlign = "left";
  pen.fillText(panel.title, box.x, box.y - 9);
  pen.fillRect(box.x, box.y + box.h, box.w, 1);
  pen.textAlign = "right";
  for (const [share, text] of panel.labels) pen.fillText(text, box.x - 6, box.y + (1 - share) * box.h + 4);
  pen.textAlign = "center";
  data.gpus.forEach((n, i) => (i % 2 ? null : pen.fillText(n.toLocaleString("en"), at(i), box.y + box.h + 17)));
  pen.fillText("GPUs", box.x + box.w / 2, box.y + box.h + 33);
  panel.draw(pen, box, at);
  panel.legend.forEach(([name, color, dash], i) => {
    const y = box.y + box.h + BOTTOM + i * LEGEND;
    curve(pen, { y, h: 8 }, color, dash, [box.x, box.x + 24], () => 0, (x) => x);
    pen.fillStyle = look.ink;
    pen.textAlign = "left";
    pen.fillText(name, box.x + 32, y + 12);
  });
}

function draw(canvas, width, data, place) {
  const ratio = window.devicePixelRatio || 1, look = theme(canvas), all = panels(data, look);
  const columns = width < NARROW ? 1 : 3;
  const tall = TOP + HIGH + BOTTOM + LEGEND * Math.max(...all.map(({ legend }) => legend.length)) + 8;
  const height = (tall * all.length) / columns;
  canvas.style.height = `${height}px`;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.fillStyle = look.paper;
  pen.fillRect(0, 0, width, height);
  const wide = width / columns;
  return all.map((panel, i) => {
    const box = { x: (i % columns) * wide + LEFT, y: Math.floor(i / columns) * tall + TOP, w: wide - LEFT - RIGHT, h: HIGH };
    drawPanel(pen, look, box, data, panel, place);
    return box;
  });
}

function render({ model, el }) {
  const canvas = sliderCanvas(model, "touch-action: pan-y"), line = document.createElement("div");
  line.style.cssText = "padding: 4px 0; font-size: 14px";
  el.append(canvas, line);
  let data, boxes;
  const last = () => data.gpus.length - 1;
  const load = () => {
    data = model.get("data");
  };
  const redraw = (width) => {
    const place = Math.min(model.get("place"), last());
    boxes = draw(canvas, width, data, place);
    line.textContent = data.words[place];
    canvas.setAttribute("aria-valuemax", last());
    canvas.setAttribute("aria-valuenow", place);
    canvas.setAttribute("aria-valuetext", data.words[place]);
  };
  const page = (place, way) => place + 3 * way;
  const { move, end } = live({ model, canvas, name: "place", last, page, load, redraw });
  canvas.addEventListener("pointermove", (event) => {
    const { left, top } = canvas.getBoundingClientRect(), x = event.clientX - left, y = event.clientY - top;
    const box = boxes.find((one) => x >= one.x && x < one.x + one.w && y >= one.y && y < one.y + one.h);
    if (box) move(Math.floor(((x - box.x) / box.w) * data.gpus.length));
  });
  return end;
}

export default { render };
