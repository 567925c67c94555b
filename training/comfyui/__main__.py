"""python -m training.comfyui: the folder of the ComfyUI that tests and demo use, or an empty line."""

from training.comfyui import find_comfyui

if __name__ == "__main__":
    print(find_comfyui() or "")
