from deepseek.api import generate as generate
from deepseek.api import open_data as open_data
from deepseek.api import train as train
from deepseek.config import ConfigError as ConfigError
from deepseek.config import ModelConfig as ModelConfig
from deepseek.config import RunConfig as RunConfig
from deepseek.config import UserError as UserError
from deepseek.config import load_config as load_config
from deepseek.config import resolved_yaml as resolved_yaml
from deepseek.config.cost import count_parameters as count_parameters
from deepseek.interop.open_weights import open_checkpoint as open_checkpoint
from deepseek.models.transformer import Transformer as Transformer
from deepseek.monitoring.run_log import read_run as read_run
from deepseek.training.step import DeepSeekModel as DeepSeekModel

__version__: str
