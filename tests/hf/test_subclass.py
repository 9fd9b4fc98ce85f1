import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kvfold import hf
from kvfold.hf import subclass


def python(code: str, *given: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_classes_imports_no_model() -> None:
    code = """
import sys
import kvfold.hf
print([name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name])
"""
    assert [name for name in eval(python(code)) if not name.endswith("modeling_auto")] == []


@pytest.mark.parametrize(
    ("model_type", "head"), [("kvfold_llama", "AutoModelForCausalLM"), ("kvfold_t5", "AutoModelForSeq2SeqLM")]
)
def test_a_process_that_imports_the_package_loads_a_config_and_a_pickled_model(
    model_type: str, head: str, tmp_path: Path
) -> None:
    assert hf.load
    sizes = {"vocab_size": 16, "num_key_value_heads": 1}
    if model_type == "kvfold_t5":
        sizes |= {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    else:
        sizes |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CONFIG_MAPPING[model_type](**sizes)
    model = getattr(transformers, head).from_config(config)
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    torch.save(model, tmp_path / "model")
    code = f"""
import pickle, sys, torch, transformers
import kvfold.hf
config = pickle.loads(open(sys.argv[1] + "/config", "rb").read())
print(type(transformers.{head}.from_config(config)).__name__)
"""
    assert python(code, str(tmp_path)).strip() == type(model).__name__
    code = """
import sys, torch
print(type(torch.load(sys.argv[1] + "/model", weights_only=False)).__name__)
"""
    assert python(code, str(tmp_path)).strip() == type(model).__name__


def test_every_class_that_is_made_when_needed_has_its_name() -> None:
    for module, name in subclass._AWAITED:
        assert getattr(sys.modules[module], name).__name__ == name


def test_a_name_that_no_class_has_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="'KvfoldNothing'"):
        hf.per_layer.KvfoldNothing  # noqa: B018
