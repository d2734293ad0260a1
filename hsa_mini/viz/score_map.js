// A score map: the mouse or the arrow keys choose a token, without a call to the kernel. The numbers come from Python.
// Dimensions: T tokens (left to right), N chunks (top to bottom), K kept chunks per token.

// The colour map cividis of matplotlib, from dark to bright, as red, green and blue
const HEAT = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
  [155, 148, 118], [188, 174, 108], [222, 201, 88], [254, 232, 56],
];
const RED = "#D55E00", BLUE = "#0072B2";
const HEIGHT = 360, TOP = 26, BOTTOM = 44, LEFT = 52, GAP = 84, NUMBER = 60;
const NARROW = 680; // below this width the bars stand under the map

function color(share) {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((part, c) => Math.round(part + (place - low) * (HEAT[low + 1][c] - part)));
}

function read(model) {
  const data = model.get("data");
  const [T, N, K] = data.shape;
  const [scores, weights] = [data.scores, data.weights].map((view) => typed(view, Float32Array));
  return { T, N, K, scores, weights, indices: typed(data.indices, Int32Array) };
}

// The heat map with one pixel per cell. It is painted once for each new set of numbers.
function paintMap({ T, N, scores }) {
  const picture = new OffscreenCanvas(T, N);
  const pixels = new ImageData(T, N);
  const seen = scores.filter(Number.isFinite);
  const low = seen.reduce((a, b) => Math.min(a, b), Infinity);
  const high = seen.reduce((a, b) => Math.max(a, b), -Infinity);
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < N; i++) {
      const score = scores[t * N + i];
      if (Number.isFinite(score)) pixels.data.set([...color((score - low) / (high - low || 1)), 255], 4 * (i * T + t));
    }
  }
  picture.getContext("2d").putImageData(pixels, 0, 0);
  return picture;
}

function draw(canvas, width, numbers, map, token) {
  const narrow = width < NARROW;
  const height = narrow ? 2 * HEIGHT - BOTTOM : HEIGHT, split = narrow ? width - 10 : width * 0.68;
  const { pen, look } = cleared(canvas, width, height);
  const box = { x: LEFT, y: TOP, w: split - LEFT, h: HEIGHT - TOP - BOTTOM };
  const bars = narrow ? { ...box, y: TOP + HEIGHT } : { ...box, x: split + GAP, w: width - split - GAP };
  drawMap(pen, look, box, numbers, map, token);
  drawBars(pen, look, { ...bars, w: bars.w - NUMBER }, numbers, token);
  return box;
}

function drawMap(pen, look, box, { T, N, K, indices }, map, token) {
  const cell = [box.w / T, box.h / N];
  pen.fillStyle = look.pale;
  pen.fillRect(box.x, box.y, box.w, box.h);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(map, box.x, box.y, box.w, box.h);
  pen.fillStyle = RED;
  for (let slot = 0; slot < T * K; slot++) {
    if (indices[slot] < 0) continue;
    const x = box.x + (Math.floor(slot / K) + 0.5) * cell[0], y = box.y + (indices[slot] + 0.5) * cell[1];
    pen.fillRect(x - 1, y - 1.5, 2, 3);
  }
  const at = box.x + (token + 0.5) * cell[0];
  pen.fillStyle = "white";
  pen.fillRect(at - 0.75, box.y, 1.5, box.h);
  pen.fillStyle = look.ink;
  pen.beginPath();
  pen.moveTo(at, box.y);
  pen.lineTo(at - 7, box.y - 12);
  pen.lineTo(at + 7, box.y - 12);
  pen.fill();
  pen.font = "13px sans-serif";
  pen.textAlign = "center";
  const step = Math.max(1, 10 ** Math.floor(Math.log10(T / 3)));
  for (let t = 0; t < T; t += step) pen.fillText(t, box.x + (t + 0.5) * cell[0], box.y + box.h + 18);
  pen.fillText("token", box.x + box.w / 2, box.y + box.h + 37);
  axis(pen, look, box, N);
}

// Bars of the weights, in the same rows as the map.
function drawBars(pen, look, box, { N, K, indices, weights }, token) {
  const row = box.h / N;
  pen.fillStyle = look.ink;
  pen.font = "13px sans-serif";
  pen.textAlign = "left";
  pen.fillText(`weights of token ${token}`, box.x, box.y - 10);
  pen.fillRect(box.x, box.y, 1, box.h);
  for (let slot = token * K; slot < (token + 1) * K; slot++) {
    if (indices[slot] < 0) continue;
    const y = box.y + indices[slot] * row, length = weights[slot] * box.w;
    pen.fillStyle = BLUE;
    pen.fillRect(box.x, y + 0.1 * row, length, 0.8 * row);
    pen.fillStyle = look.ink;
    pen.fillText(weights[slot].toFixed(2), box.x + length + 5, y + row / 2 + 4);
  }
  axis(pen, look, box, N);
}

function axis(pen, look, box, N) {
  pen.fillStyle = look.ink;
  pen.textAlign = "right";
  const step = Math.max(1, Math.ceil(N / 8));
  for (let i = 0; i < N; i += step) pen.fillText(i, box.x - 6, box.y + ((i + 0.5) * box.h) / N + 4);
  pen.save();
  pen.translate(box.x - 36, box.y + box.h / 2);
  pen.rotate(-Math.PI / 2);
  pen.textAlign = "center";
  pen.fillText("chunk", 0, 0);
  pen.restore();
}

function describe({ K, indices, weights }, token) {
  const kept = [];
  for (let slot = token * K; slot < (token + 1) * K; slot++) {
    if (indices[slot] >= 0) kept.push(`chunk ${indices[slot]} with ${weights[slot].toFixed(2)}`);
  }
  return `Token ${token} keeps ${kept.join(", ") || "nothing: no chunk is complete before it"}.`;
}

function render({ model, el }) {
  const canvas = sliderCanvas(model);
  const line = document.createElement("div");
  line.style.cssText = "padding: 4px 0; font-size: 14px";
  el.append(canvas, line);

  let numbers, map, box;
  const load = () => {
    numbers = read(model);
    map = paintMap(numbers);
  };
  const redraw = (width) => {
    const token = Math.min(model.get("token"), numbers.T - 1);
    box = draw(canvas, width, numbers, map, token);
    line.textContent = describe(numbers, token);
    canvas.setAttribute("aria-valuemax", numbers.T - 1);
    canvas.setAttribute("aria-valuenow", token);
    canvas.setAttribute("aria-valuetext", line.textContent);
  };
  const last = () => numbers.T - 1;
  const page = (token, way) => token + way * Math.ceil(numbers.T / numbers.N);
  const { move, end } = live({ model, canvas, name: "token", last, page, load, redraw });
  canvas.addEventListener("pointermove", (event) => {
    const { left } = canvas.getBoundingClientRect();
    const share = (event.clientX - left - box.x) / box.w;
    if (share >= 0 && share < 1) move(Math.floor(share * numbers.T));
  });
  return end;
}

export default { render };
