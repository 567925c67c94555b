// The frontend makes a node anew when it is pasted, put into a subgraph or taken out of one, moves the sockets that have
// grown behind all others, and then connects links by the sockets' old numbers: all subjects but the first would be lost.
// So the sockets go back to where they were.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "moa.socketsInOrder",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "MoAPatchModel") return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved) {
      const order = (saved.inputs ?? []).map((input) => input.name);
      configure.call(this, saved);
      const connected = this.graph && this.inputs.some((input) => input.link != null); // of a workflow: in order already
      if (connected || !this.inputs.every((input) => order.includes(input.name))) return;
      this.inputs.sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name));
    };
  },
});
