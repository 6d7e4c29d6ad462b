"""/v1/methods, /v1/schemes and /v1/datasets"""

from __future__ import annotations

from fastapi import APIRouter

from api.catalogue import service
from api.catalogue.schemas import DatasetList, MethodList, MethodRead, SchemeList, SchemeRead
from api.http.codes import EVERYWHERE, documented
from api.http.dependencies import Context, Reader
from compression import catalogue

router = APIRouter(prefix="/v1", tags=["catalogue"], responses=documented(EVERYWHERE))


@router.get("/methods", response_model=MethodList)
def list_methods(_: Reader) -> MethodList:
    """The methods a recipe's steps may name, what they are for, and what they go with."""
    return MethodList(items=[MethodRead.model_validate(method) for method in catalogue.methods()])


@router.get("/schemes", response_model=SchemeList)
def list_schemes(_: Reader) -> SchemeList:
    """The schemes weights may get, how they are stored, and what makes them."""
    return SchemeList(items=[SchemeRead.model_validate(scheme) for scheme in catalogue.schemes()])


@router.get("/datasets", response_model=DatasetList)
def list_datasets(caller: Reader, context: Context) -> DatasetList:
    """The kinds of datasets that jobs may name here, those with a short name, and how much is taken."""
    return service.datasets(context.settings, caller.limits.max_body_bytes)
