from absl import flags

def DEFINE_config_file(
    name: str,
    default: str | None = ...,
    help_string: str = ...,
    *,
    lock_config: bool = ...,
    accept_new_attributes: bool = ...,
) -> flags.FlagHolder: ...
