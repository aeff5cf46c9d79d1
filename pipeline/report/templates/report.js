// Filter chips: shows the cards of one verdict, and hides the sections that have none.
const chips = [...document.querySelectorAll("[data-show]")];
for (const chip of chips) {
  chip.addEventListener("click", () => {
    for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
    for (const section of document.querySelectorAll("section")) {
      let shown = 0;
      for (const card of section.querySelectorAll(".card")) {
        card.hidden = chip.dataset.show !== "all" && card.dataset.verdict !== chip.dataset.show;
        if (!card.hidden) shown += 1;
      }
      section.classList.toggle("empty", shown === 0);
    }
  });
}

// Long captions and messages are cut; a click shows the whole of them, and a second one cuts them again.
for (const text of document.querySelectorAll(".card .text")) {
  text.addEventListener("click", () => {
    if (!String(getSelection())) text.closest(".card").classList.toggle("open");
  });
}
