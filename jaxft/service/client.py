"""The oldest form of the calls, `client.fine_tunes`, which no present client has any more.

from jaxft.service.client import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="…")
client.fine_tunes.create(training_file="file-…", model="…", n_epochs=4)
"""

from functools import cached_property
from typing import Any

try:
    import openai
except ImportError as error:
    raise ImportError("This extends the client of OpenAI: pip install openai") from error


class FineTune(openai.BaseModel):
    """A job, as the first scripts know it.

    Attributes:
      id: Id that begins with `ft-`.
      status: `pending`, `running`, `succeeded`, `failed` or `cancelled`.
      model: Base model.
      fine_tuned_model: Name of what it made; None before.
      hyperparams: Settings, resolved once they are known.
      events: Messages, the oldest first.
      training_files: Files that it learns from.
      validation_files: Files that it is evaluated on.
      result_files: Tables of its figures.
      created_at: Time in seconds since 1970.
      updated_at: Time of its last change.
    """

    id: str
    status: str
    model: str
    fine_tuned_model: str | None
    hyperparams: dict[str, Any]
    events: list[dict[str, Any]]
    training_files: list[dict[str, Any]]
    validation_files: list[dict[str, Any]]
    result_files: list[dict[str, Any]]
    created_at: int
    updated_at: int


class FineTuneList(openai.BaseModel):
    """Jobs in their oldest form.

    Attributes:
      data: The jobs, the oldest first.
    """

    data: list[FineTune]


class EventList(openai.BaseModel):
    """Events of such a job.

    Attributes:
      data: The events, the oldest first.
    """

    data: list[dict[str, Any]]


class FineTunes:
    """The calls of `client.fine_tunes`."""

    def __init__(self, client: openai.OpenAI):
        self._client = client

    def create(self, *, training_file: str, **settings: Any) -> FineTune:
        """Makes a job.

        Args:
          training_file: Id of an uploaded file.
          settings: `model`, `validation_file`, `suffix`, `n_epochs`, `batch_size`,
            `learning_rate_multiplier`.
        """
        body = {"training_file": training_file, **settings}
        return self._client.post("/fine-tunes", body=body, cast_to=FineTune)

    def list(self) -> "FineTuneList":
        """Returns all jobs that were made in this form, as `data`."""
        return self._client.get("/fine-tunes", cast_to=FineTuneList)

    def retrieve(self, number: str) -> FineTune:
        """Returns a job."""
        return self._client.get(f"/fine-tunes/{number}", cast_to=FineTune)

    def cancel(self, number: str) -> FineTune:
        """Cancels a job."""
        return self._client.post(f"/fine-tunes/{number}/cancel", cast_to=FineTune)

    def list_events(self, number: str) -> EventList:
        """Returns the events of a job, as `data`."""
        return self._client.get(f"/fine-tunes/{number}/events", cast_to=EventList)


class OpenAI(openai.OpenAI):
    """The client of OpenAI, with `fine_tunes` as it once was."""

    @cached_property
    def fine_tunes(self) -> FineTunes:
        """The calls for jobs in their oldest form."""
        return FineTunes(self)
