"use strict";
for (const compare of document.querySelectorAll(".compare")) {
  const slider = compare.querySelector("input");
  if (!slider) continue;
  const move = () => compare.style.setProperty("--split", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
const brightness = document.getElementById("brightness");
if (brightness) {
  brightness.addEventListener("input", () => {
    document.documentElement.style.setProperty("--brightness", brightness.value);
  });
}
const labels = document.getElementById("labels");
if (labels) {
  labels.addEventListener("change", () => document.body.classList.toggle("without-labels", !labels.checked));
}
