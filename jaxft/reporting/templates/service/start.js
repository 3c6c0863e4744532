// A file that is dropped beside the place for it must not be opened instead of the page.
for (const kind of ["dragover", "drop"])
  window.addEventListener(kind, (event) => event.preventDefault());
window.addEventListener("hashchange", () => {
  show();
  view.focus({ preventScroll: true });
  scrollTo(0, 0);
});
show();
