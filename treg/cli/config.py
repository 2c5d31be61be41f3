"""treg config: configurations of accelerate by name."""

from treg.cli.options import ConfigOptions, parse
from treg.rewards.names import nearest

# each decoder layer is a unit of FSDP2; accelerate puts the last norm and the head into one of
# their own
FSDP2 = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: true
  fsdp_state_dict_type: FULL_STATE_DICT
mixed_precision: "no" # --bf16 sets it
num_machines: 1
num_processes: 2 # GPUs; --num_processes of accelerate launch says otherwise
"""
MULTI_GPU = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: "no" # --bf16 sets it
num_machines: 1
num_processes: 2 # GPUs; --num_processes of accelerate launch says otherwise
"""
PROFILES = {"fsdp2": FSDP2, "multi_gpu": MULTI_GPU}


def run(argv: list[str]) -> None:
    # the name may stand without its option
    if argv and not argv[0].startswith("-"):
        argv = ["--name", *argv]
    (options,) = parse("config", argv, (ConfigOptions,))
    if options.name not in PROFILES:
        raise ValueError(
            f"name: expected one of {', '.join(PROFILES)}, got {options.name!r}"
            f"{nearest(options.name, PROFILES)}"
        )
    print(PROFILES[options.name], end="")
