// Sends an image to /detect, draws what is found, and filters it by score without asking again.
const $ = (id) => document.getElementById(id);
const LEAST = 0.05; // score: what the slider can show is asked for at once
let model = null;
let found = []; // [{score, box: element, row: element}]
let current = null; // AbortController of the request under way

const sentence = (text) =>
  text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function complain(text) {
  $("error").textContent = text ? sentence(text) : "";
  $("error").hidden = !text;
}

// What was shown before is not of the file that was refused.
function refuse(text) {
  complain(text);
  found = [];
  document.body.classList.remove("seen");
  $("figure").hidden = $("found").hidden = true;
}

async function begin() {
  $("curl").textContent =
    `curl -H 'Content-Type: image/jpeg' --data-binary @street.jpg '${location.origin}/detect'\n` +
    `curl -F image=@street.jpg -F image=@yard.png '${location.origin}/detect?threshold=0.5&most=20'`;
  try {
    model = await (await fetch("/model")).json();
  } catch {
    complain("the service does not answer; reload the page once it runs");
    return;
  }
  const { classes, limits } = model;
  const names = classes.slice(0, 6).map((c) => c.name).join(", ");
  const more = classes.length > 6 ? " …" : "";
  $("about").textContent =
    `${model.recipe}: ${classes.length} ${classes.length === 1 ? "class" : "classes"} (${names}${more})`;
  $("accepted").textContent =
    `JPEG, PNG, WebP, GIF, BMP or TIFF, up to ${limits.megabytes} MB and ` +
    (limits.longest_side ? `sides of ${limits.longest_side} pixels` :
      `${limits.megapixels} million pixels`);
  $("threshold").value = Math.max(LEAST, limits.threshold);
  filter();
}

async function look(file) {
  current?.abort();
  const mine = (current = new AbortController());
  complain("");
  if (model && file.size > model.limits.megabytes * 1e6) {
    refuse(`the file has ${(file.size / 1e6).toFixed(1)} MB, and ${model.limits.megabytes} MB are taken`);
    return;
  }
  document.body.classList.add("waiting");
  try {
    const response = await fetch(`/detect?threshold=${LEAST}&most=100`, {
      method: "POST",
      body: file,
      // The service looks at the bytes; a file of no known type is for it to judge, too.
      headers: { "Content-Type": file.type.startsWith("image/") ? file.type : "image/unknown" },
      signal: mine.signal,
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    show(file, answer);
  } catch (error) {
    if (mine.signal.aborted) return;
    const known = error instanceof TypeError || error instanceof SyntaxError;
    refuse(known ? "the service does not answer; is it still running?" : error.message);
  } finally {
    if (current === mine) document.body.classList.remove("waiting");
  }
}

function show(file, answer) {
  const { width, height, detections, damage } = answer.images[0];
  if (damage) complain("the file is damaged, and what is found in it may be wrong");
  const image = $("image");
  URL.revokeObjectURL(image.src);
  image.onerror = () => complain("this browser cannot show such a file; what was found is listed");
  image.src = URL.createObjectURL(file);
  image.alt = file.name ? `The image ${file.name}` : "The image";
  // Small ones are shown larger, so that boxes and names have room.
  const scale = Math.max(1, Math.min(4, Math.floor(480 / Math.max(width, height))));
  $("figure").classList.toggle("small", scale > 1);
  image.width = width * scale;
  image.style.aspectRatio = `${width} / ${height}`;
  const hues = new Map(model.classes.map((c, i) => [c.category_id, (i * 137.508 + 210) % 360]));

  found = detections.map((detection) => {
    const { label, score, box: [x0, y0, x1, y1] } = detection;
    const hue = hues.get(detection.category_id);
    const box = document.createElement("div");
    box.className = "box";
    box.style.setProperty("--hue", hue);
    box.style.left = `${(100 * x0) / width}%`;
    box.style.top = `${(100 * y0) / height}%`;
    box.style.width = `${(100 * (x1 - x0)) / width}%`;
    box.style.height = `${(100 * (y1 - y0)) / height}%`;
    box.classList.toggle("top", y0 < 0.06 * height);
    box.classList.toggle("right", x0 > 0.75 * width);
    const name = document.createElement("span");
    name.textContent = `${label} ${score.toFixed(2)}`;
    box.append(name);

    const row = document.createElement("li");
    row.tabIndex = 0;
    row.style.setProperty("--hue", hue);
    for (const [tag, text] of [
      ["b", label],
      ["i", score.toFixed(2)],
      ["small", `${x0.toFixed(0)}, ${y0.toFixed(0)} to ${x1.toFixed(0)}, ${y1.toFixed(0)}`],
    ]) {
      const part = document.createElement(tag);
      part.textContent = text;
      row.append(part);
    }
    const one = { score, box, row };
    for (const element of [box, row]) {
      element.addEventListener("pointerenter", () => light(one));
      element.addEventListener("pointerleave", () => light(null));
    }
    row.addEventListener("focus", () => light(one));
    row.addEventListener("blur", () => light(null));
    return one;
  });
  // Large boxes first, so that the pointer reaches the small ones; of two alike the better on top.
  const size = ({ box: { style } }) =>
    Math.round(Math.log2(parseFloat(style.width) * parseFloat(style.height)));
  const order = [...found].sort((a, b) => size(b) - size(a) || a.score - b.score);
  $("boxes").replaceChildren(...order.map((d) => d.box));
  $("list").replaceChildren(...found.map((d) => d.row));
  $("status").dataset.about = `${width} × ${height} pixels, ${answer.seconds.toFixed(2)} s`;
  document.body.classList.add("seen");
  $("figure").hidden = $("found").hidden = false;
  filter();
}

function light(one) {
  document.body.classList.toggle("some-lit", one !== null);
  for (const each of found) {
    each.box.classList.toggle("lit", each === one);
    each.row.classList.toggle("lit", each === one);
  }
}

function filter() {
  const least = Number($("threshold").value);
  $("shown").textContent = least.toFixed(2);
  let count = 0;
  for (const { score, box, row } of found) {
    box.hidden = row.hidden = score < least;
    count += score >= least;
  }
  $("status").textContent =
    `${count} ${count === 1 ? "object" : "objects"}; ${$("status").dataset.about ?? ""}`;
}

const first = (files) => files && files.length > 0 && look(files[0]);
$("file").addEventListener("change", (event) => {
  first(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
$("threshold").addEventListener("input", filter);
document.addEventListener("paste", (event) => first(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  first(event.dataTransfer.files);
});
begin();
