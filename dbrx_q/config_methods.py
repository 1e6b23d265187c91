"""Methods that every configuration of transformers has: to and from dictionaries, JSON and folders."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .config_keys import CONVERTED_TYPE, FOREIGN_KEYS, check_refused
from .config_rope import without_default_theta
from .config_sections import Section
from .config_values import shortened
from .errors import ConfigError, RequestError
from .json_file import read_json_object

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ConfigMethods", "must_equal"]


class ConfigMethods(Section):
    """The base of `DbrxConfig`."""

    model_type: str
    sub_configs: ClassVar[dict[str, type[Section]]]
    name_or_path: str
    _attn_implementation: str | None

    def validate(self) -> None:
        """See `DbrxConfig.validate`."""
        raise NotImplementedError

    @classmethod
    def of(cls, config: Any) -> Self:
        """The configuration that a user gives: one of this class itself, one of transformers, a dictionary, or a folder, file or hub id.

        A configuration of transformers is recognised by its `model_type`. Its `attn_config.rope_theta`, which transformers ignores, is read
        here; the base 10000 that transformers puts in place of it is not.

        Raises:
            ConfigError: it is of another model, or holds a value that no DBRX model can have.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, str | os.PathLike):
            return cls.from_json_file(config) if Path(config).is_file() else cls.from_pretrained(config)
        if isinstance(config, Mapping):
            return cls.from_dict(config, source="config")
        if getattr(config, "model_type", None) == cls.model_type and callable(getattr(config, "to_dict", None)):
            values = without_default_theta(config.to_dict())
            for name in cls.sub_configs:  # transformers 5.15 refuses to read what its own parts hold beside their fields
                values[name] = {key: value for key, value in dict(values[name]).items() if key not in FOREIGN_KEYS}
            own = cls.from_dict(values, source=f"{type(config).__module__}.{type(config).__name__}")
            own.name_or_path = str(getattr(config, "name_or_path", "") or "")
            own._attn_implementation = getattr(config, "_attn_implementation", None)
            return own
        raise ConfigError(
            f"config must be a DbrxConfig, of this package or of transformers, a dictionary or a path; found {type(config).__name__}"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Read config.json of a folder, or of a repository on the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder, or an `owner/name` of the hub.
            cache_dir: where the hub's files are kept; None for the hub's own cache.
            force_download: fetch the file even if the cache has it.
            local_files_only: use the cache alone, without a network.
            token: access token for a gated repository.
            revision: branch, tag or commit on the hub.
            trust_remote_code: not needed; no code of a repository is ever run.
            kwargs: values that take the place of those in the file, and `return_unused_kwargs`; see `from_dict`.

        Raises:
            CheckpointError: no such folder or repository, or a file that is not JSON.
            ConfigError: a value that no DBRX model can have.
            TypeError: an unknown argument.
        """
        # Imported here, since `checkpoint` imports the configuration: a configuration loads itself, as in transformers.
        from dbrx_q.checkpoint.hub import Download, resolve_file

        path = resolve_file(
            pretrained_model_name_or_path,
            "config.json",
            revision=revision,
            token=token,
            download=Download(cache_dir, local_files_only, force_download),
        )
        with_unused = kwargs.pop("return_unused_kwargs", False)
        values: Any = cls.from_dict(read_json_object(path), source=str(path), return_unused_kwargs=True, **kwargs)
        config, unused = values
        if unused and not with_unused:
            from .config_keys import nearest

            name = next(iter(unused))
            raise TypeError(
                f"{cls.__name__}.from_pretrained() got an unexpected keyword argument {name!r}{nearest(name, config.to_dict())}"
            )
        config.name_or_path = os.fspath(pretrained_model_name_or_path)
        result: Any = (config, unused) if with_unused else config
        return result

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], *, source: str = "config.json", return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self:
        """The configuration in the JSON object of a config.json. Keys that inference does not read are kept, also in its parts.

        Args:
            config_dict: the parsed JSON object.
            source: its name in errors.
            return_unused_kwargs: return (configuration, arguments that name no attribute of it).
            kwargs: values that take the place of those in `config_dict`.

        Raises:
            ConfigError: another model type, or a value that no DBRX model can have.
        """
        model_type = config_dict.get("model_type")
        if model_type not in (cls.model_type, CONVERTED_TYPE):
            raise ConfigError(f"{source}: model_type must be 'dbrx'; found {shortened(model_type)}. Point to a DBRX checkpoint")
        try:
            config = cls._of_file(config_dict)
            unused = {}
            for name, value in kwargs.items():
                if name == "attn_implementation":
                    config._attn_implementation = value
                elif not hasattr(config, name):
                    unused[name] = value
                elif name in ("dtype", "torch_dtype") and value == "auto":
                    continue
                else:
                    own = isinstance(value, Mapping) and name in cls.sub_configs
                    setattr(config, name, getattr(config, name).to_dict() | dict(value) if own else value)
            config.validate()
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        result: Any = (config, unused) if return_unused_kwargs else config
        return result

    @classmethod
    def _of_file(cls, data: Mapping[str, Any]) -> Self:
        """The configuration in a JSON object, with all keys that it does not read as attributes."""
        check_refused("", data, read=("rope_parameters", "rope_scaling"))
        arguments = cls._arguments()
        known = {name: value for name, value in data.items() if name in arguments}
        unread: dict[str, Mapping[str, Any]] = {}
        for key, section in cls.sub_configs.items():
            value = data.get(key)
            if isinstance(value, Mapping):
                check_refused(f"{key}.", value)
                known[key] = {name: item for name, item in value.items() if name in section._fields}
                unread[key] = {name: item for name, item in value.items() if name not in section._fields and name != "model_type"}
            for name in section._fields:
                if name in data and name != "rope_theta" and data[name] != (value or {}).get(name):
                    raise ConfigError(f"{name} must be in {key}; found {shortened(data[name])} at the top level. Move it")
        trained = data.get("original_max_position_embeddings")
        for key in ("rope_parameters", "rope_scaling"):
            value = known.get(key)
            if trained is not None and isinstance(value, Mapping) and "yarn" in (value.get("rope_type"), value.get("type")):
                must_equal(
                    "original_max_position_embeddings",
                    trained,
                    f"{key}.original_max_position_embeddings",
                    value.get("original_max_position_embeddings"),
                )
                known[key] = {**value, "original_max_position_embeddings": trained}
        config = cls(**known)
        for key, values in unread.items():
            getattr(config, key).update(values)
        hidden = ("model_type", "name_or_path", "_name_or_path")
        config.update({name: value for name, value in data.items() if name not in arguments and name not in hidden})
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """The configuration in a JSON file of any name.

        Raises:
            CheckpointError: the file is missing or not JSON.
            ConfigError: a value that no DBRX model can have.
        """
        return cls.from_dict(read_json_object(Path(json_file)), source=os.fspath(json_file))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the keys of config.json, arguments that name none of them); arguments as for `from_pretrained`."""
        values: Any = cls.from_pretrained(pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs)
        config, unused = values
        return config.to_dict(), unused

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the keys that have their default values, as transformers prints a configuration."""
        default = type(self)().to_dict()
        kept = ("model_type", "architectures")
        return {name: value for name, value in self.to_dict().items() if name in kept or name not in default or value != default[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The configuration as JSON text.

        Args:
            use_diff: leave out keys that have their default values.
        """
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` into a file."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json into a folder, which is created if it does not exist.

        Args:
            save_directory: the folder.
            push_to_hub: whether to upload the folder's config.json, too.
            kwargs: of `push_to_hub`.

        Raises:
            RequestError: the folder is a file, or the hub refuses the upload.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise RequestError(f"{folder}: the destination must be a folder; found a file. Give another name")
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / ".config.json.partial"
        unfinished.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / "config.json")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        elif kwargs:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {next(iter(kwargs))!r}")

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, private: bool | None = None, token: str | None = None) -> str:
        """Upload config.json to a repository, which is created if it does not exist; returns the address of the commit.

        Raises:
            RequestError: the hub refuses it.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        try:
            repository = str(api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True).repo_id)
            message = commit_message or "Upload config"
            commit = api.upload_file(path_or_fileobj=text.encode(), path_in_repo="config.json", repo_id=repository, commit_message=message)
            return str(commit.commit_url)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RequestError(f"{repo_id}: the hub must take the configuration; it says: {reason}. Log in with `hf auth login`") from None

    def update_from_string(self, update_str: str) -> None:
        """Set attributes from a text such as "n_layers=2,use_cache=false".

        Raises:
            RequestError: an unknown key, or a value that is not of the type of the attribute.
        """
        for pair in update_str.split(","):
            name, _, text = pair.partition("=")
            if not hasattr(self, name):
                raise RequestError(f"update_from_string must name attributes of the configuration; found {name!r}")
            try:
                value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
            except ValueError:
                value = text
            setattr(self, name, value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The configuration itself, which is that of a text model."""
        return self

    @classmethod
    def _arguments(cls) -> set[str]:
        """The names of the constructor's arguments."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def must_equal(name: str, value: int, alias: str, other: Any) -> None:
    """Refuse another name for a value that differs from it.

    Raises:
        ConfigError: names both.
    """
    if other is not None and other != value:
        raise ConfigError(f"{alias} is another name for {name} and must equal it; found {shortened(other)} and {value}")
