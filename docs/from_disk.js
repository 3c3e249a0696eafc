// A browser starts no worker of a page that lies on a disk, and search runs in one. There a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.early = []
      this.onmessage = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.addEventListener("load", () => this.start(new URL(url, location.href).href), { once: true })
      document.body.append(this.frame)
    }

    start(url) {
      const inside = this.frame.contentWindow
      inside.postMessage = (data) => this.later(() => {
        const event = new MessageEvent("message", { data: structuredClone(data) })
        this.dispatchEvent(event)
        this.onmessage?.(event)
      })
      const script = inside.document.createElement("script")
      script.src = url
      script.addEventListener("load", () => {
        const early = this.early
        this.early = null
        early.forEach((data) => this.postMessage(data))
      })
      inside.document.body.append(script)
    }

    postMessage(data) {
      if (this.early !== null) return void this.early.push(data)
      const inside = this.frame.contentWindow // data is copied there, or its arrays would be of another page's class
      const event = new inside.MessageEvent("message", { data: inside.structuredClone(data) })
      this.later(() => inside.dispatchEvent(event))
    }

    later(deliver) { // a worker never answers while it is being asked
      setTimeout(() => this.frame.isConnected && deliver())
    }

    terminate() {
      this.frame.remove()
    }
  }
}
