"""Customers and their orders, and a session for each app context."""

from __future__ import annotations

import datetime

import sqlalchemy as sa
from flask import Flask
from flask import current_app
from flask import g
from flask_login import UserMixin
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm import Mapped
from sqlalchemy.orm import Session
from sqlalchemy.orm import mapped_column
from sqlalchemy.orm import relationship
from werkzeug.security import check_password_hash
from werkzeug.security import generate_password_hash


class Base(DeclarativeBase):
    pass


class Customer(UserMixin, Base):  # type: ignore[misc]
    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    password: Mapped[str]
    orders: Mapped[list[Order]] = relationship(back_populates="customer", order_by="Order.id")

    def knows(self, password: str) -> bool:
        return check_password_hash(self.password, password)


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customers.id"))
    item: Mapped[str]
    state: Mapped[str]
    delivery: Mapped[datetime.date]
    customer: Mapped[Customer] = relationship(back_populates="orders")


def db() -> Session:
    """The session of this app context: a request's, or that of one call of a tool."""
    if "db" not in g:
        g.db = Session(current_app.extensions["shop_engine"])
    session: Session = g.db
    return session


def init_app(app: Flask) -> None:
    engine = sa.create_engine(app.config["DATABASE_URL"])
    app.extensions["shop_engine"] = engine

    @app.teardown_appcontext
    def close(error: BaseException | None) -> None:
        # What was not committed is rolled back.
        if (session := g.pop("db", None)) is not None:
            session.close()

    app.cli.command("fill", help="Make the tables, and two customers if there is none.")(fill)


def fill() -> None:
    engine = current_app.extensions["shop_engine"]
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        if session.scalar(sa.select(sa.func.count(Customer.id))) == 0:
            _fill(session)
            session.commit()


def _fill(session: Session) -> None:
    word = generate_password_hash("demo")
    day = datetime.date(2030, 5, 2)
    ann = Customer(id=1, name="ann", password=word)
    bob = Customer(id=2, name="bob", password=word)
    ann.orders = [
        Order(id=1, item="a teapot", state="sent", delivery=day),
        Order(id=2, item="two cups", state="packed", delivery=day),
    ]
    bob.orders = [Order(id=3, item="a kettle", state="packed", delivery=day)]
    session.add_all([ann, bob])
