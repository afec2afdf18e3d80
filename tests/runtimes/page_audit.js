// What a reader would stumble over in a page as it is shown now: answers with lists of complaints, empty where all is well.
(() => {
  const shown = (element) => {
    const box = element.getBoundingClientRect();
    return box.width > 0 && box.height > 0 && getComputedStyle(element).visibility !== "hidden";
  };
  const words = (element) => element.textContent.trim().slice(0, 40);

  // colours
  const channels = (colour) => {
    const found = colour.match(/[\d.]+/g).map(Number);
    return found.length === 3 ? [...found, 1] : found;
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const over = (above, below) => [0, 1, 2].map((i) => above[3] * above[i] + (1 - above[3]) * below[i]);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0 && !at.closest("svg")) layers.push(colour);
      if (colour[3] === 1 && !at.closest("svg")) break;
    }
    return layers.reverse().reduce((below, above) => over(above, below), [255, 255, 255]);
  };
  const behindText = (text) => {
    const box = text.getBoundingClientRect();
    const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    let found = behind(text.ownerSVGElement.parentElement);
    for (const shape of text.ownerSVGElement.querySelectorAll("rect, circle")) {
      if (text.compareDocumentPosition(shape) & Node.DOCUMENT_POSITION_FOLLOWING) break;
      const area = shape.getBoundingClientRect();
      const style = getComputedStyle(shape);
      if (style.fill === "none" || area.left > x || area.right < x || area.top > y || area.bottom < y) continue;
      const fill = channels(style.fill);
      found = over([...fill.slice(0, 3), fill[3] * Number(style.fillOpacity)], found);
    }
    return found;
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !shown(element) || ["title", "desc", "style"].includes(element.tagName)) continue;
    const svg = element.tagName === "text";
    const ink = channels(svg ? getComputedStyle(element).fill : getComputedStyle(element).color).slice(0, 3);
    const ratio = contrast(ink, svg ? behindText(element) : behind(element));
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${element.tagName}.${element.getAttribute("class")}: ${words(element)}`);
  }

  // texts of drawings: over each other, or out of the cell they stand in
  const crossed = [], outside = [];
  for (const svg of document.querySelectorAll("svg[role=img]")) {
    if (!shown(svg)) continue;
    const texts = [...svg.querySelectorAll("text")].filter(shown).map((text) => [text, text.getBoundingClientRect()]);
    const slack = 2 * (svg.getBoundingClientRect().width / svg.viewBox.baseVal.width); // boxes are higher than letters
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
      if (a.left + slack < b.right && b.left + slack < a.right && a.top + slack < b.bottom && b.top + slack < a.bottom)
        crossed.push(`${words(svg)}: ${words(one)} / ${words(other)}`);
    }));
    for (const [text, box] of texts) {
      if (!/\b(on-h|heading)/.test(text.getAttribute("class"))) continue;
      let cell = null;
      for (const rect of svg.querySelectorAll("rect")) {
        if (text.compareDocumentPosition(rect) & Node.DOCUMENT_POSITION_FOLLOWING) break;
        cell = rect;
      }
      const area = cell.getBoundingClientRect();
      if (box.left < area.left - 1 || box.right > area.right + 1 || box.top < area.top - 2 || box.bottom > area.bottom + 2)
        outside.push(`${words(svg)}: ${words(text)}`);
    }
  }

  // what is wider than its place
  const root = document.documentElement;
  const wide = root.scrollWidth > root.clientWidth ? [`page: ${root.scrollWidth} of ${root.clientWidth}`] : [];
  const hidden = [...document.querySelectorAll(".scroll")]
    .filter((part) => part.scrollWidth > part.clientWidth + 1)
    .map((part) => `${part.getAttribute("aria-label")}: ${part.scrollWidth} of ${part.clientWidth}`);
  return { faint, crossed, outside, wide, hidden };
})()
