// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "launch/listen_internal.h"

namespace capstan::launch::internal {

namespace {

using AddressList = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

AddressList resolve(const std::string& address) {
  addrinfo hints = {};
  hints.ai_flags = AI_NUMERICHOST | AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.c_str(), "0", &hints, &found) != 0) {
    throw ConfigError({.module = "launch",
                       .what = "reading the address for the store",
                       .got = quote(address),
                       .need = "a numeric address of this machine, such as 127.0.0.1"});
  }
  return {found, &::freeaddrinfo};
}

[[noreturn]] void throw_bind(const std::string& address, int code) {
  throw EnvError({.module = "launch",
                  .what = "listening on a free port of " + address,
                  .got = std::strerror(code)});
}

}  // namespace

Listener listen_on_free_port(const std::string& address) {
  const AddressList target = resolve(address);
  Listener listener;
  listener.socket = capstan::Descriptor(::socket(target->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int number = listener.socket.get();
  if (number < 0 || ::bind(number, target->ai_addr, target->ai_addrlen) != 0 ||
      ::listen(number, 4096) != 0) {
    throw_bind(address, errno);
  }
  sockaddr_storage bound = {};
  socklen_t size = sizeof(bound);
  if (::getsockname(number, reinterpret_cast<sockaddr*>(&bound), &size) != 0) {
    throw_bind(address, errno);
  }
  const in_port_t port = bound.ss_family == AF_INET6
                             ? reinterpret_cast<const sockaddr_in6*>(&bound)->sin6_port
                             : reinterpret_cast<const sockaddr_in*>(&bound)->sin_port;
  listener.port = ntohs(port);
  return listener;
}

}  // namespace capstan::launch::internal
