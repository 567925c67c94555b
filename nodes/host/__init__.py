"""What the pack has of ComfyUI: its folders and files, its sockets and messages, the layers of its U-Net."""
