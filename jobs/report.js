// The curves' legend and the values under the pointer. The page is whole without it.
const charts = document.querySelector(".charts");
if (charts) {
  const tip = charts.querySelector(".tip");
  const groups = (name) => charts.querySelectorAll(`[data-group="${name}"]`);

  for (const key of document.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const shown = key.getAttribute("aria-pressed") !== "true";
      key.setAttribute("aria-pressed", shown);
      groups(key.dataset.group).forEach((g) => g.classList.toggle("off", !shown));
    });
  }

  const leave = () => {
    tip.hidden = true;
    charts.querySelectorAll(".here").forEach((ring) => (ring.style.display = "none"));
    charts.querySelectorAll(".dim").forEach((g) => g.classList.remove("dim"));
  };

  for (const svg of charts.querySelectorAll("svg")) {
    const ring = svg.querySelector(".here");
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
        svg.getScreenCTM().inverse());
      let best = null;
      for (const line of svg.querySelectorAll(".line:not(.off)")) {
        const points = line.querySelector("polyline").points;
        for (let i = 0; i < points.numberOfItems; i++) {
          const point = points.getItem(i);
          const distance = Math.hypot(point.x - at.x, point.y - at.y);
          if (!best || distance < best.distance) best = { distance, line, point, i };
        }
      }
      leave();
      if (!best || best.distance > 60) return;
      const [x, y] = best.line.dataset.values.split(" ")[best.i].split(",");
      const axis = svg.getAttribute("aria-label").split(" against ")[1].split(" (")[0];
      tip.textContent = `${best.line.dataset.name}: AP ${(+y).toFixed(1)} at ${+x} ${axis}`;
      tip.hidden = false;
      ring.style.display = "block";
      ring.setAttribute("cx", best.point.x);
      ring.setAttribute("cy", best.point.y);
      svg.querySelectorAll(".line").forEach((g) => g.classList.toggle("dim", g !== best.line));
      const box = charts.getBoundingClientRect();
      const left = event.clientX - box.left + 14;
      tip.style.left = `${Math.min(left, box.width - tip.offsetWidth - 4)}px`;
      tip.style.top = `${event.clientY - box.top + 14}px`;
    });
  }
}
