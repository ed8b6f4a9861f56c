// The control with a label, in the widget of that number: what takes the keys (a slider's handle, a drop-down, a check
// box) or, with "box", all of it. Arguments: number, label, part. null where there is not exactly one.
const [index, wanted, part] = arguments;
const boxes = [...document.querySelectorAll('.jupyter-widgets.widget-vbox')][index]
  .querySelectorAll('.widget-slider, .widget-dropdown, .widget-checkbox');
const labels = (box) => [...box.querySelectorAll('label')].map((label) => label.textContent.trim());
const named = [...boxes].filter((box) => labels(box).includes(wanted));
if (named.length !== 1) return null;
return part === 'box' ? named[0] : named[0].querySelector('.noUi-handle, select, input[type=checkbox]');
