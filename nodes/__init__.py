"""ComfyUI's side: the nodes and what they need of the host. The only code that imports comfy."""

from comfy_api.latest import ComfyExtension, io

from .from_ip_adapter import MoAFromIPAdapter
from .from_photomaker import MoAFromPhotoMaker
from .host.example_photo import add_example_photos
from .host.folders import add_model_folders
from .host.toy_family import register_toy_family
from .instantid_control import MoAInstantIDControl
from .load_subject import MoALoadSubject
from .loader import MoALoader
from .lora_subject import MoALoRASubject
from .patch_model import MoAPatchModel
from .report import MoAReport
from .router_visualizer import MoARouterVisualizer
from .save_subject import MoASaveSubject
from .subject_encoder import MoASubjectEncoder
from .subject_interpolate import MoASubjectInterpolate
from .toy_subject import MoAToySubject

add_model_folders()
add_example_photos()
register_toy_family()


class MoAExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            MoALoader,
            MoAFromIPAdapter,
            MoASubjectEncoder,
            MoALoRASubject,
            MoAPatchModel,
            MoARouterVisualizer,
            MoASubjectInterpolate,
            MoASaveSubject,
            MoALoadSubject,
            MoAToySubject,
            MoAFromPhotoMaker,
            MoAReport,
            MoAInstantIDControl,
        ]


async def comfy_entrypoint() -> MoAExtension:
    return MoAExtension()
