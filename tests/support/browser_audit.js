// What a reader of a page can see. Every function returns a list of problems, each with the text it is about.

const rootElement = document.scrollingElement

function shown(element) {
  return element.checkVisibility({ visibilityProperty: true, opacityProperty: true })
}

// [element, text, rectangles] of every visible piece of text.
function texts() {
  const found = []
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const node = walker.currentNode
    const text = node.textContent.trim()
    if (!text || node.parentElement.closest("style, defs, title") || !shown(node.parentElement)) continue
    const range = document.createRange()
    range.selectNodeContents(node)
    found.push([node.parentElement, text.slice(0, 60), [...range.getClientRects()].filter(each => each.width > 0)])
  }
  return found
}

function scrolls(element) {
  return ["auto", "scroll"].includes(getComputedStyle(element).overflowX)
}

function scroller(element) {
  for (let each = element; each && each !== document.body; each = each.parentElement) if (scrolls(each)) return each
  return null
}

function pageOverflow() {
  const width = rootElement.clientWidth
  return rootElement.scrollWidth > width ? [`the page is ${rootElement.scrollWidth} px wide, the window ${width}`] : []
}

// Text outside the window that no scrolling reaches, outside its plot, or cut off by an element around it.
function clippedText() {
  const wrong = []
  for (const [element, text, rectangles] of texts()) {
    const box = element.closest("svg")?.getBoundingClientRect() ?? { left: 0, right: rootElement.clientWidth }
    const reachable = element.closest("svg") === null && scroller(element) !== null
    for (const each of rectangles) {
      if (!reachable && (each.left < box.left - 1 || each.right > box.right + 1)) {
        wrong.push(`${text}: from ${each.left} to ${each.right} px, expected ${box.left} to ${box.right}`)
      }
    }
    for (let each = element; each !== document.body; each = each.parentElement) {
      const hidden = ["hidden", "clip"].includes(getComputedStyle(each).overflowX) && each.tagName !== "svg"
      if (hidden && each.scrollWidth > each.clientWidth + 1) wrong.push(`${text}: cut off by <${each.tagName}>`)
    }
  }
  return wrong
}

// Labels of a plot that are drawn over each other.
function overlappingLabels() {
  const wrong = []
  for (const svg of document.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map(each => [each.textContent, each.getBoundingClientRect()])
    boxes.forEach(([text, a], index) => {
      for (const [other, b] of boxes.slice(index + 1)) {
        const width = Math.min(a.right, b.right) - Math.max(a.left, b.left)
        const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)
        if (width > 2 && height > 0.4 * Math.min(a.height, b.height)) wrong.push(`${text} over ${other}`)
      }
    })
  }
  return wrong
}

function smallText(minimum, minimumOfPlots) {
  const wrong = []
  for (const [element, text] of texts()) {
    const matrix = element.closest("svg") ? element.getScreenCTM() : null
    const scale = matrix ? Math.hypot(matrix.c, matrix.d) : 1
    const size = parseFloat(getComputedStyle(element).fontSize) * scale
    if (size < (matrix ? minimumOfPlots : minimum) - 0.05) wrong.push(`${text}: ${size.toFixed(1)} px`)
  }
  return wrong
}

// Cells so narrow that their text stands in a column of syllables although it has room to be wider.
function narrowCells(minimum) {
  const wrong = []
  for (const cell of document.querySelectorAll("td, th")) {
    const style = getComputedStyle(cell)
    const width = cell.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight)
    const range = document.createRange()
    range.selectNodeContents(cell)
    const lines = new Set([...range.getClientRects()].map(each => Math.round(each.top))).size
    const longest = Math.max(0, ...cell.textContent.split(/[\s-]+/).map(word => word.length))
    if (lines > 1 && width < minimum && longest * 0.45 * parseFloat(style.fontSize) > width) {
      wrong.push(`${cell.textContent.slice(0, 60)}: ${lines} lines, ${width} px wide`)
    }
  }
  return wrong
}

function linear(channel) {
  return channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4
}

const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true })
const colours = new Map()

// [red, green, blue, opacity] from 0 to 1 of any CSS colour, as the browser paints it.
function colour(css) {
  if (!colours.has(css)) {
    canvas.clearRect(0, 0, 1, 1)
    canvas.fillStyle = css
    canvas.fillRect(0, 0, 1, 1)
    colours.set(css, [...canvas.getImageData(0, 0, 1, 1).data].map(each => each / 255))
  }
  return colours.get(css)
}

function luminance([red, green, blue]) {
  return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
}

function ground(element) {
  for (let each = element; each; each = each.parentElement) {
    const found = colour(getComputedStyle(each).backgroundColor)
    if (found[3] === 1) return found
  }
  return colour("Canvas")
}

function contrast(css, element) {
  const [one, other] = [luminance(colour(css)), luminance(ground(element))]
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)
}

function faintText(minimum) {
  const wrong = new Set()
  for (const [element, text] of texts()) {
    const style = getComputedStyle(element)
    const ratio = contrast(element.closest("svg") ? style.fill : style.color, element)
    if (ratio < minimum) wrong.add(`${text}: contrast ${ratio.toFixed(2)}`)
  }
  return [...wrong]
}

// Curves and bars of plots, without grids and axes, which are faint on purpose.
function faintCurves(minimum) {
  const wrong = new Set()
  for (const each of document.querySelectorAll("svg path, svg rect.first, svg rect.second")) {
    const style = getComputedStyle(each)
    const curve = each.tagName === "rect" ? style.fill : parseFloat(style.strokeWidth) > 1.3 ? style.stroke : "none"
    if (curve === "none" || !shown(each) || each.closest("defs")) continue
    const ratio = contrast(curve, each)
    if (ratio < minimum) wrong.add(`${curve}: contrast ${ratio.toFixed(2)}`)
  }
  return [...wrong]
}

// Plots without a size, without curves or bars, or with some outside their frame.
function undrawnPlots() {
  const wrong = []
  for (const svg of document.querySelectorAll("svg")) {
    const name = svg.getAttribute("aria-label")
    const frame = svg.getBoundingClientRect()
    const drawn = [...svg.querySelectorAll("path, rect")].filter(each => !each.closest("defs"))
    const boxes = drawn.map(each => each.getBoundingClientRect()).filter(each => each.width + each.height > 0)
    if (frame.width < 100 || frame.height < 20) wrong.push(`${name}: ${frame.width} x ${frame.height} px`)
    if (boxes.filter(each => each.width > 5 || each.height > 5).length < 2) wrong.push(`${name}: nothing drawn`)
    if (boxes.some(each => each.right > frame.right + 2 || each.left < frame.left - 2)) wrong.push(`${name}: overflows`)
    const parent = svg.parentElement
    if (!scrolls(parent) && frame.right > parent.getBoundingClientRect().right + 1) wrong.push(`${name}: too wide`)
  }
  return wrong
}

function headingsAndNames() {
  const wrong = []
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map(each => Number(each.tagName[1]))
  if (levels[0] !== 1 || levels.filter(each => each === 1).length !== 1) wrong.push(`levels of headings: ${levels}`)
  levels.forEach((level, index) => {
    if (index && level > levels[index - 1] + 1) wrong.push(`h${level} after h${levels[index - 1]}`)
  })
  for (const each of document.querySelectorAll("svg, img")) {
    if (each.getAttribute("role") !== "img" || !each.getAttribute("aria-label")?.trim()) wrong.push("a plot without name")
  }
  for (const table of document.querySelectorAll("table")) {
    if (!scroller(table)) wrong.push(`a table without a container of its own: ${table.textContent.slice(0, 60)}`)
  }
  if (!document.title.trim() || document.documentElement.lang !== "en") wrong.push("no title or language")
  return wrong
}
