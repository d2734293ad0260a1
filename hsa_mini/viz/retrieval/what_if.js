// What if: the changes that a reader makes, and their effect on the answer, which Python computes (see what_if.py).
// explorer.js puts the parts into the page.

const UNCHANGED = () => ({ layer: null, top_k: null, pin: new Set(), drop: new Set(), shares: new Map(), swap: [], concatenated: false, hsa: true, window: true });

// picture(), number(): of the model that is shown. move(): the controls of kept chunks have changed.
function makeWhatIf(model, picture, number, move) {
  let change = UNCHANGED();
  const field = (name, attributes) => make("input", { type: "number", step: 1, min: 0, "aria-label": name, ...attributes });
  const check = (name) => make("input", { type: "checkbox", "aria-label": name });
  const button = (name, act) => {
    const made = make("button", { type: "button" }, name);
    made.addEventListener("click", act);
    return made;
  };
  const [top_k, pin, first, second] = [field("K", { min: 1 }), field("Chunk to pin"), field("Chunk to swap"), field("Chunk to swap it with")];
  const [hsa, window_] = [check("HSA"), check("Window")];
  const reading = make("select", { "aria-label": "How kept chunks are read" }, make("option", { value: "" }, "fused"), make("option", { value: "1" }, "concatenated"));
  const where = make("select", { "aria-label": "Layers that change" });
  const chips = make("div", { class: "hsa-row", role: "group", "aria-label": "Changes" });
  const line = make("div", { class: "hsa-line", role: "status" }), rows = make("div", { class: "hsa-effect", role: "list" });
  const option = (name, part) => make("span", {}, `${name} `, part);
  const row = (...parts) => make("div", { class: "hsa-row" }, ...parts);
  const root = make(
    "div", { class: "hsa-what-if" },
    row(option("K", top_k), option("HSA", hsa), option("Window", window_), option("Kept chunks are", reading), option("Change", where)),
    row(option("Pin chunk", pin), option("Swap chunk", first), option("with", second)),
    chips, line, rows,
  );

  const say = (text) => void (line.textContent = text);
  const composed = () => {
    const { pin, drop, shares } = change;
    return { content: { model: number(), change: { ...change, pin: [...pin], drop: [...drop], shares: [...shares] } }, buffers: [] };
  };
  const requests = makeRequests(model, composed, say, (busy) => {
    rows.setAttribute("aria-busy", busy);
    if (!busy) effect(); // also if it is the same as before
  });
  const set = (more) => {
    Object.assign(change, more);
    show();
    move();
    requests.ask();
  };
  const toggle = (kind, chunk) => {
    change[kind].delete(chunk) || change[kind].add(chunk);
    set({});
  };
  const undo = (name, act) => {
    const made = button(`${name} ×`, () => {
      act();
      set({});
      (chips.querySelector("button") ?? top_k).focus();
    });
    made.setAttribute("aria-label", `Undo: ${name}`);
    return made;
  };
  // The fields and the list of changes as they are.
  const show = () => {
    const { layer, pin, drop, shares, swap } = change;
    Object.assign(top_k, { value: change.top_k ?? picture().top_k, max: picture().chunks });
    [hsa.checked, window_.checked] = [change.hsa, change.window];
    [reading.value, where.value] = [change.concatenated ? "1" : "", layer ?? ""];
    const made = [
      ...[...drop].map((chunk) => undo(`chunk ${count(chunk)} dropped`, () => drop.delete(chunk))),
      ...[...pin].map((chunk) => undo(`chunk ${count(chunk)} pinned`, () => pin.delete(chunk))),
      ...[...shares].map(([chunk, share]) => undo(`chunk ${count(chunk)} has weight ${share.toFixed(2)}`, () => shares.delete(chunk))),
      ...swap.map(([a, b], i) => undo(`chunks ${count(a)} and ${count(b)} swapped`, () => swap.splice(i, 1))),
    ];
    const changed = made.length || change.top_k !== null || !change.hsa || !change.window || change.concatenated;
    chips.replaceChildren(...made, ...(changed ? [button("Undo all", () => (set(UNCHANGED()), top_k.focus()))] : []));
  };
  const effect = ({ line: text, error, words, before, after } = model.get("effect")) => {
    say(error ?? text ?? "Drop or pin a kept chunk, set its weight, or change K: the model reads the question anew.");
    showPairs(rows, (words ?? []).map((name, i) => ({ name, before: before[i], after: after[i] })));
  };
  const reload = () => {
    change = UNCHANGED();
    const layers = picture().layers.map((_, i) => make("option", { value: i }, `HSA layer ${i}`));
    where.replaceChildren(make("option", { value: "" }, "all HSA layers"), ...layers);
    for (const field of [pin, first, second]) Object.assign(field, { value: "", max: picture().text_chunks - 1 });
    show();
    effect({});
  };
  // Enter, or leaving a field, takes a number.
  const typed = (field) => (field.value === "" ? null : Number(field.value));
  top_k.addEventListener("change", () => set({ top_k: typed(top_k) === picture().top_k ? null : typed(top_k) }));
  hsa.addEventListener("change", () => set({ hsa: hsa.checked }));
  window_.addEventListener("change", () => set({ window: window_.checked }));
  reading.addEventListener("change", () => set({ concatenated: reading.value !== "" }));
  where.addEventListener("change", () => set({ layer: where.value === "" ? null : Number(where.value) }));
  pin.addEventListener("change", () => {
    if (pin.value !== "") change.pin.add(typed(pin));
    pin.value = "";
    set({});
  });
  for (const field of [first, second])
    field.addEventListener("change", () => {
      if (first.value === "" || second.value === "") return;
      change.swap.push([typed(first), typed(second)]);
      [first.value, second.value] = ["", ""];
      set({});
    });

  // The controls of a kept chunk, which `card.chunk` names.
  const controls = (card) => {
    const drop = button("Drop", () => toggle("drop", card.chunk)), pinned = button("Pin", () => toggle("pin", card.chunk));
    const weight = make("input", { type: "range", min: 0, max: 1, step: 0.01 });
    weight.addEventListener("input", () => {
      change.shares.set(card.chunk, Number(weight.value));
      set({});
    });
    const update = (kept) => {
      drop.ariaPressed = change.drop.has(card.chunk);
      pinned.ariaPressed = change.pin.has(card.chunk);
      for (const [node, name] of [[drop, "Drop"], [pinned, "Pin"], [weight, "Weight of"]]) node.ariaLabel = `${name} chunk ${count(card.chunk)}`;
      const share = change.shares.get(card.chunk) ?? kept.weight;
      if (Number(weight.value) !== share) weight.value = share;
    };
    return { root: row(drop, pinned, weight), update };
  };
  return { root, reload, effect: () => effect(), controls, requests };
}
