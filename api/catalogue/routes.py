"""/v1/methods and /v1/schemes"""

from __future__ import annotations

from fastapi import APIRouter

from api.catalogue.schemas import MethodList, MethodRead, SchemeList, SchemeRead
from api.dependencies import Reader
from api.errors import documented
from compression import catalogue

router = APIRouter(prefix="/v1", tags=["catalogue"], responses=documented(401, 403, 422, 429, 503))


@router.get("/methods", response_model=MethodList)
def list_methods(_: Reader) -> MethodList:
    """The methods a recipe's steps may name, what they are for, and what they go with."""
    return MethodList(items=[MethodRead.model_validate(method) for method in catalogue.methods()])


@router.get("/schemes", response_model=SchemeList)
def list_schemes(_: Reader) -> SchemeList:
    """The schemes weights may get, how they are stored, and what makes them."""
    return SchemeList(items=[SchemeRead.model_validate(scheme) for scheme in catalogue.schemes()])
