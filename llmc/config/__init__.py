"""Reading and checking of the YAML configuration. Light: imports neither torch nor any other package of llmc."""

from llmc.config.load import LoadedConfig, load_config
from llmc.config.schema import Config

__all__ = ["Config", "LoadedConfig", "load_config"]
