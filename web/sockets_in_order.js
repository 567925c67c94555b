// The frontend makes a node anew when it is pasted, put into a subgraph or taken out of one, and then connects it by its
// sockets' old numbers. Subjects would be lost: newer frontends move the sockets that have grown behind all others, so
// they go back to where they were; older ones (1.37) hear of every socket that nothing is connected to yet as of one
// that was just disconnected, and close the gap a moment later.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "moa.socketsInOrder",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "MoAPatchModel") return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved) {
      const sockets = saved.inputs ?? [];
      const links = sockets.map((input) => this.graph?.getLink(input.link)).filter(Boolean);
      const isInAWorkflow = links.some((link) => link.target_id === saved.id); // its sockets are in order already
      if (isInAWorkflow) return configure.call(this, saved);
      const heard = this.onConnectionsChange;
      this.onConnectionsChange = undefined;
      configure.call(this, saved);
      this.onConnectionsChange = heard;
      const order = sockets.map((input) => input.name);
      if (!this.inputs.every((input) => order.includes(input.name))) return;
      this.inputs.sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name));
    };
  },
});
