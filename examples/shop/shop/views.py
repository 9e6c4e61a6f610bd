"""The shop's own pages."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa
from flask import Blueprint
from flask import Flask
from flask import flash
from flask import redirect
from flask import render_template
from flask import request
from flask import url_for
from flask_login import LoginManager
from flask_login import current_user
from flask_login import login_required
from flask_login import login_user
from flask_login import logout_user

from shop.agent import PREFIX
from shop.models import Customer
from shop.models import db

bp = Blueprint("shop", __name__)


@bp.get("/login")
def login() -> str:
    return render_template("login.html")


@bp.post("/login")
def log_in() -> t.Any:
    wanted = sa.select(Customer).where(Customer.name == request.form["name"])
    customer = db().scalar(wanted)
    if customer is None or not customer.knows(request.form["password"]):
        flash("No such name and password.")
        return redirect(url_for(".login"))
    login_user(customer)
    return redirect(url_for(".orders"))


@bp.post("/logout")
def log_out() -> t.Any:
    logout_user()
    return redirect(url_for(".login"))


@bp.get("/")
@login_required  # type: ignore[untyped-decorator]
def orders() -> str:
    return render_template("orders.html", orders=current_user.orders, agent=f"{PREFIX}/")


@bp.get("/healthz")
def healthz() -> dict[str, bool]:
    return {"ok": True}


def init_app(app: Flask) -> None:
    manager = LoginManager(app)
    manager.login_view = "shop.login"
    manager.user_loader(lambda number: db().get(Customer, int(number)))
    app.register_blueprint(bp)
