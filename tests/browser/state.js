// What a page with widgets shows. One script, so that no reference to an element can go stale between its lines.
const all = (query) => [...document.querySelectorAll(query)];
const widgets = '.jupyter-widgets.widget-vbox';
const picture = (img) => ({
  kind: img.src.slice(0, 22),
  sum: img.src.slice(-64),  // a PNG ends with checksums of its pixels
  alt: img.alt,
  wide: img.complete && img.naturalWidth,
  shown: img.clientWidth,
});
return {
  numbers: all('.jp-CodeCell .jp-InputPrompt').map((e) => e.textContent),  // of code cells: [ ]:, [*]: or [7]:
  trouble: all('[data-mime-type$="stderr"], [data-mime-type$="error"]')
    .concat(all(widgets + ' .widget-html-content > pre')).map((e) => e.textContent),
  pictures: all(widgets).map((box) => box.querySelector('.widget-html-content img')).filter(Boolean).map(picture),
};
