# In place of postgres:*-bookworm: Debian's PostgreSQL with that image's user, folders and variables.
FROM scratch
ADD base.tar /
COPY postgres-entrypoint /usr/local/bin/docker-entrypoint.sh
RUN usermod --uid 999 postgres && groupmod --gid 999 postgres && rm -r /var/lib/postgresql/* \
    && install --directory --owner=postgres --group=postgres --mode=1777 \
        /var/lib/postgresql/data /var/run/postgresql
ENV LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin:/usr/lib/postgresql/15/bin PGDATA=/var/lib/postgresql/data
ENTRYPOINT ["docker-entrypoint.sh"]
STOPSIGNAL SIGINT
CMD ["postgres"]
