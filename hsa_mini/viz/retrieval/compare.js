// Compare: what is selected is kept, and stands beside whatever is selected later. So two tokens, layers, heads or models of
// the same text are compared.

// { name, picture, token, layer, head, weights: Map of chunk -> weight, next: [word, share] } of a selection.
function keep(picture, model, selected) {
  const { token, layer, head } = selected, { H, J } = picture;
  const heads = head < J ? "mean of its heads" : `head ${head - J + 1}`;
  return {
    ...selected,
    picture,
    name: `${model ? `${model}, ` : ""}${placeOf(picture, token)}, HSA layer ${layer}, ${heads}`,
    weights: new Map(keptChunks(picture, selected).map(({ chunk, weight }) => [chunk, weight])),
    next: [picture.next.words[token][0], picture.next.shares[5 * token]],
  };
}

// Rows [chunk, weight in a, weight in b], the heaviest first, and the overlap: the sum of the smaller weights.
function compare(a, b) {
  const chunks = [...new Set([...a.weights.keys(), ...b.weights.keys()])];
  const rows = chunks.map((chunk) => [chunk, a.weights.get(chunk) ?? 0, b.weights.get(chunk) ?? 0]);
  rows.sort((x, y) => Math.max(y[1], y[2]) - Math.max(x[1], x[2]));
  return { rows, overlap: total(rows.map(([, x, y]) => Math.min(x, y))), both: rows.filter(([chunk]) => a.weights.has(chunk) && b.weights.has(chunk)).length };
}

function makeCompare(now, move) {
  let kept = null;
  const button = make("button", { type: "button" }, "Keep this for comparison");
  const line = make("div", { class: "hsa-line", role: "status" }), list = make("div", { class: "hsa-effect", role: "list" });
  const root = make("div", { class: "hsa-compare" }, make("div", { class: "hsa-row" }, button), line, list);
  button.addEventListener("click", () => {
    kept = kept ? null : now();
    button.textContent = kept ? "End the comparison" : "Keep this for comparison";
    move();
  });
  const redraw = () => {
    line.textContent = "";
    list.replaceChildren();
    if (!kept) return;
    const b = now(), { rows, overlap, both } = compare(kept, b), { size } = b.weights;
    const word = ([text, share]) => `“${visible(text)}” (${share.toFixed(3)})`;
    line.textContent =
      `Kept: ${kept.name}. Now: ${b.name}. Of ${count(kept.weights.size)} and ${count(size)} chunks, ${count(both)} are the same. ` +
      `The weights overlap by ${overlap.toFixed(3)}. The likeliest next tokens are ${word(kept.next)} and ${word(b.next)}.`;
    showPairs(list, rows.map(([chunk, x, y]) => ({ name: `${count(chunk)}${holdsNeedle(b.picture, chunk) ? " ▲" : ""}`, before: x, after: y })));
  };
  const end = () => kept && button.click();
  return { root, redraw, end, kept: () => kept };
}
