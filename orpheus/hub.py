"""Until its last importers have moved: what is now in files.py."""

import contextlib

from orpheus.files import (  # noqa: F401
    MODEL_FILES,
    TOKENIZER_FILES,
    absolute_path_or_hub_id,
    check_weights,
    fetch,
    find_base,
    is_adapter,
    is_hub_id,
    is_model,
    read_headers,
)
from orpheus.settings import UserError, first_reason, is_out_of_memory


@contextlib.contextmanager
def as_user_error(path):
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: does not load: {first_reason(error)}") from error
